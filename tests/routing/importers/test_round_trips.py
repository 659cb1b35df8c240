"""What was written in a documented form comes out of its importer token for token."""

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiermoe.routing.importers import IMPORTERS
from hiermoe.routing.importers.as_trace import to_trace
from hiermoe.routing.importers.recording import Source
from hiermoe.routing.trace import RoutingTrace
from tests.routing.importers.files import (
    record,
    some_ids,
    write_esft,
    write_flame,
    write_lines,
    write_llama,
    write_megatron,
    write_npy,
    write_npz,
    write_parquet,
)
from tests.routing.importers.others import (
    write_logits,
    write_recorder,
    write_replay,
    write_requests,
    write_rollouts,
    write_sglang_responses,
    write_tensorrt_llm,
)
from tests.routing.test_text_file import PACKERS

# Writers of [layer, N, K] and E, with the number that the first layer gets.
WRITERS = {
    "npy": (lambda folder, ids, experts=16: write_npy(folder / "a.npy", ids), 0),
    "npz": (lambda folder, ids, experts=16: write_npz(folder / "a.npz", ids), 0),
    "esft": (lambda folder, ids, experts=16: write_esft(folder / "law", ids), 2),
    "llama-csv": (lambda folder, ids, experts=16: write_llama(folder / "a.csv", ids), 0),
    "parquet": (lambda folder, ids, experts=16: write_flame(folder / "iter_0540", ids), 2),
    "sglang": (lambda folder, ids, experts=16: write_recorder(folder / "a.pt", ids, experts), 2),
    "responses": (lambda folder, ids, experts=16: write_sglang_responses(folder / "a.jsonl", ids), 2),
    "rollouts": (lambda folder, ids, experts=16: write_rollouts(folder / "a.pt", ids), 2),
    "replay": (lambda folder, ids, experts=16: write_replay(folder / "a.pt", ids), 0),
    "logits": (lambda folder, ids, experts=16: write_logits(folder / "a.pt", ids, experts), 0),
    "requests": (lambda folder, ids, experts=16: write_requests(folder / "requests", ids), 4),
    "tensorrt-llm": (lambda folder, ids, experts=16: write_tensorrt_llm(folder / "statistic", ids, experts), 4),
    "megatron": (lambda folder, ids, experts=16: write_megatron(folder / "m", ids[None, :, None]), 0),
}
all_formats = pytest.mark.parametrize("name", WRITERS)


def imported(name: str, path: Path, num_experts: int | str | None = 16, **options: object) -> RoutingTrace:
    source = Source(path, **options)  # type: ignore[arg-type]
    return to_trace(IMPORTERS[name].read(source), source, name, "any", num_experts, "hiermoe trace import")


def flat(trace: RoutingTrace) -> np.ndarray:
    """[layer, N, K] of a trace whose ranks are all full."""
    return np.moveaxis(trace.expert_ids, 1, 0).reshape(trace.expert_ids.shape[1], -1, trace.expert_ids.shape[-1])


def test_every_format_is_tested() -> None:
    assert set(WRITERS) == set(IMPORTERS)


@all_formats
@settings(deadline=None, max_examples=15)
@given(
    layers=st.integers(1, 3),
    tokens=st.integers(1, 40),
    topk=st.integers(1, 5),
    num_experts=st.sampled_from([5, 256, 257, 1000]),
    seed=st.integers(0, 99),
)
def test_round_trip(name: str, layers: int, tokens: int, topk: int, num_experts: int, seed: int) -> None:
    ids_LNK = some_ids(layers, tokens, topk, num_experts, seed)
    write, first_layer = WRITERS[name]
    with TemporaryDirectory() as folder:
        trace = imported(name, write(Path(folder), ids_LNK, num_experts), num_experts, topk=topk, zeros="expert")
        saved = Path(folder) / "a.trace"
        trace.save(saved)
        again = RoutingTrace.load(saved)
    np.testing.assert_array_equal(flat(again), ids_LNK)
    assert again.metadata.layers == list(range(first_layer, first_layer + layers))
    assert (again.metadata.num_experts, again.metadata.topk) == (num_experts, topk)


@pytest.mark.parametrize("name", ["npy", "llama-csv", "parquet"])
def test_tokens_are_laid_out_over_ranks_in_their_order(name: str, tmp_path: Path) -> None:
    ids_LNK = some_ids(tokens=24)
    path = WRITERS[name][0](tmp_path, ids_LNK)
    trace = imported(name, path, topk=3, ranks=4, tokens_per_rank=3)
    assert trace.expert_ids.shape == (2, 2, 4, 3, 3)
    np.testing.assert_array_equal(flat(trace), ids_LNK)
    fewer = imported(name, path, topk=3, ranks=4, max_tokens=16)
    assert fewer.expert_ids.shape == (1, 2, 4, 4, 3)
    np.testing.assert_array_equal(flat(fewer), ids_LNK[:, :16])


@all_formats
def test_one_layer_of_several(name: str, tmp_path: Path) -> None:
    ids_LNK = some_ids(layers=3)
    write, first_layer = WRITERS[name]
    trace = imported(name, write(tmp_path, ids_LNK), topk=3, layers=(first_layer + 1,))
    assert trace.metadata.layers == [first_layer + 1]
    np.testing.assert_array_equal(flat(trace)[0], ids_LNK[1])


@all_formats
def test_metadata_says_where_it_is_from_and_leaves_the_rest_unknown(name: str, tmp_path: Path) -> None:
    path = WRITERS[name][0](tmp_path, some_ids(layers=1))
    meta = imported(name, path, topk=3).metadata
    file = min(path.iterdir()) if path.is_dir() else path
    assert f"importer {name} from {file.name}" in meta.notes
    assert hashlib.sha256(file.read_bytes()).hexdigest() in meta.notes
    assert "seed and loss are unknown" in meta.notes
    assert (meta.seed, meta.vocabulary, meta.loss) == (None, None, [None])
    assert (meta.router, meta.corpus) == ("unknown", "unknown")


SAY_HOW_MANY = ("sglang", "logits", "tensorrt-llm")  # experts there are


@pytest.mark.parametrize("name", SAY_HOW_MANY)
def test_number_of_experts_is_the_files_where_it_says_it(name: str, tmp_path: Path) -> None:
    path = WRITERS[name][0](tmp_path, some_ids(), 40)
    assert imported(name, path, None, topk=3).metadata.num_experts == 40
    with pytest.raises(ValueError, match="it has num_experts=40, num_experts=41 does not fit"):
        imported(name, path, 41, topk=3)


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in SAY_HOW_MANY])
def test_number_of_experts_is_asked_for_unless_inferring_was(name: str, tmp_path: Path) -> None:
    ids_LNK = some_ids()
    path = WRITERS[name][0](tmp_path, ids_LNK)
    largest = int(ids_LNK.max())
    with pytest.raises(ValueError, match=rf"largest id is {largest}; give --num-experts N"):
        imported(name, path, None, topk=3)
    trace = imported(name, path, "infer", topk=3)
    assert trace.metadata.num_experts == largest + 1
    assert f"num_experts={largest + 1} was inferred" in trace.metadata.notes


def test_inferred_number_of_experts_is_rounded_up_to_the_ranks(tmp_path: Path) -> None:
    path = write_npy(tmp_path / "a.npy", np.array([[[0, 9]] * 8]))
    assert imported("npy", path, "infer", ranks=4).metadata.num_experts == 12


def test_megatron_keeps_ragged_ranks_and_steps(tmp_path: Path) -> None:
    ids = np.stack([some_ids(6, 5, seed=i).reshape(2, 3, 5, 3) for i in range(2)])  # [step, layer, rank, T, K]
    counts = np.array([[5, 2, 4], [1, 5, 3]])
    trace = imported("megatron", write_megatron(tmp_path / "m", ids, counts), pipeline=1)
    np.testing.assert_array_equal(trace.num_tokens, counts)
    filled = np.broadcast_to((np.arange(5) < counts[..., None])[:, None], ids.shape[:-1])
    np.testing.assert_array_equal(trace.expert_ids[filled], ids[filled])
    assert trace.metadata.training_step == [0, 1]


def test_megatron_joins_the_micro_batches_of_a_step_and_leaves_other_blocks_out(tmp_path: Path) -> None:
    first, second = some_ids(1, 3)[0], some_ids(1, 2, seed=1)[0]
    other = record(7, 0, 0, first, block="mtp", mtp_idx=0)
    lines = [record(7, 0, 0, first, block="decoder"), other, record(7, 0, 0, second, block="decoder")]
    trace = imported("megatron", write_lines(tmp_path / "a.jsonl", lines), pipeline=1)
    np.testing.assert_array_equal(flat(trace)[0], np.concatenate([first, second]))
    assert trace.metadata.training_step == [7]
    assert trace.metadata.left_out == ("1 lines of other blocks than the decoder",)


def test_parquet_with_layer_step_and_token_is_put_in_order(tmp_path: Path) -> None:
    ids = np.stack([some_ids(2, 4, seed=i) for i in range(3)])  # [step, layer, T, K]
    step, layer, token = (x.ravel() for x in np.meshgrid([10, 20, 30], [1, 5], range(4), indexing="ij"))
    shuffled = np.random.default_rng(0).permutation(len(step))
    path = write_parquet(
        tmp_path / "a.parquet",
        indices=ids.reshape(-1, 3)[shuffled].tolist(),
        layer=layer[shuffled],
        step=step[shuffled],
        token=token[shuffled],
    )
    trace = imported("parquet", path, ranks=2)
    assert trace.metadata.training_step == [10, 20, 30]
    assert trace.metadata.layers == [1, 5]
    np.testing.assert_array_equal(trace.expert_ids, ids.reshape(3, 2, 2, 2, 3))


def test_llama_csv_needs_no_header(tmp_path: Path) -> None:
    ids = some_ids()
    trace = imported("llama-csv", write_llama(tmp_path / "a.csv", ids, header=False), topk=3)
    np.testing.assert_array_equal(flat(trace), ids)


@pytest.mark.parametrize(
    "header", ["layer,expert\n", '"Layer";"Expert"\n', "layer_id\texpert_id\r\n", "expert_id,layer_idx\n"]
)
def test_llama_csv_may_be_merged_of_files_with_headers(header: str, tmp_path: Path) -> None:
    ids = some_ids(tokens=12)
    separator = next((mark for mark in ";\t" if mark in header), ",")
    parts = []
    for start in (0, 5):
        rows = [(x, e) for x in range(2) for e in ids[x, start : start + (5 if start == 0 else 7)].ravel()]
        rows = [(e, x) for x, e in rows] if header.startswith("expert") else rows
        parts.append(header + "".join(f"{a}{separator}{b}\n" for a, b in rows))
    (tmp_path / "a.csv").write_text("\ufeff" + "\ufeff".join(parts), newline="")
    np.testing.assert_array_equal(flat(imported("llama-csv", tmp_path / "a.csv", topk=3)), ids)


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("name", ["llama-csv", "megatron"])
def test_text_may_be_packed_by_anything(name: str, pack: str, tmp_path: Path) -> None:
    ids = some_ids()
    path = WRITERS[name][0](tmp_path, ids)
    for file in list(path.iterdir()) if path.is_dir() else [path]:
        packed = file.with_name(file.name + (".packed" if pack != "plain" else ""))
        packed.write_bytes(PACKERS[pack](file.read_bytes()))
        if packed != file:
            file.unlink()
    path = path if path.is_dir() else next(tmp_path.glob("a.csv*"))
    np.testing.assert_array_equal(flat(imported(name, path, topk=3)), ids)


def test_a_rank_that_is_there_packed_and_unpacked_is_refused(tmp_path: Path) -> None:
    write_megatron(tmp_path / "m", some_ids()[None, :, None])
    file = tmp_path / "m" / "router_trace_rank0.jsonl"
    file.with_suffix(".jsonl.gz").write_bytes(PACKERS["gzip"](file.read_bytes()))
    with pytest.raises(ValueError, match=r"rank0.jsonl and router_trace_rank0.jsonl.gz are of one rank; leave one"):
        imported("megatron", tmp_path / "m")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("array", [False, True])
def test_megatron_may_be_pretty_printed_or_an_array(indent: int | None, array: bool, tmp_path: Path) -> None:
    ids = some_ids()
    records = [record(0, layer, 0, ids[layer]) for layer in range(2)]
    texts = [json.dumps(records, indent=indent)] if array else [json.dumps(each, indent=indent) for each in records]
    (tmp_path / "a.json").write_text("\n".join(texts))
    np.testing.assert_array_equal(flat(imported("megatron", tmp_path / "a.json")), ids)


def test_parquet_may_have_other_names_and_unequal_steps(tmp_path: Path) -> None:
    ids = some_ids(layers=1, tokens=5)[0]
    table = pa.table({"topk_ids": pa.array(ids.tolist()), "layer_id": [3] * 5, "iteration": [7, 7, 7, 9, 9]})
    pq.write_table(table, tmp_path / "a.parquet")
    trace = imported("parquet", tmp_path / "a.parquet")
    assert (trace.metadata.layers, trace.metadata.training_step) == ([3], [7, 9])
    np.testing.assert_array_equal(trace.num_tokens, [[3], [2]])
    np.testing.assert_array_equal(trace.expert_ids[[0, 0, 0, 1, 1], 0, 0, [0, 1, 2, 0, 1]], ids)


def test_megatron_rank_without_lines_in_a_step_holds_no_tokens(tmp_path: Path) -> None:
    ids = some_ids(layers=3)
    lines = [record(0, 0, 0, ids[0]), record(0, 0, 1, ids[1, :5]), record(1, 0, 1, ids[2])]
    trace = imported("megatron", write_lines(tmp_path / "a.jsonl", lines), pipeline=1)
    np.testing.assert_array_equal(trace.num_tokens, [[12, 5], [0, 12]])
    assert trace.metadata.left_out == ("1 of 4 pairs of step and rank, which have no lines and hold no tokens",)
