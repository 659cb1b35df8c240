"""`hiermoe trace`: an imported trace runs like a recorded one; its matrix and its figures equal a plain count."""

import re
from pathlib import Path

import numpy as np
import pytest

from hiermoe.commands.trace_views import show
from hiermoe.records.store import RunStore
from hiermoe.routing.trace import RoutingTrace
from hiermoe.topology.cluster import Cluster
from tests.conftest import Command
from tests.routing.importers.files import some_ids, write_npy
from tests.routing.worlds import a_trace

RANKS, TOKENS, EXPERTS, ROW_BYTES = 8, 6, 16, 48


@pytest.fixture
def trace(tmp_path: Path, hiermoe: Command) -> Path:
    """Four iterations of 8 x 6 tokens in two layers, imported."""
    ids_LNK = some_ids(2, 4 * RANKS * TOKENS, 3, EXPERTS)
    array, path = write_npy(tmp_path / "theirs.npy", ids_LNK), tmp_path / "ours.trace"
    sizes = ["--ranks", str(RANKS), "--tokens-per-rank", str(TOKENS), "--num-experts", str(EXPERTS)]
    code, out, _ = hiermoe("trace", "import", "npy", str(array), "--output", str(path), *sizes)
    assert code == 0
    assert "4 iterations x 2 layers x 8 ranks x 6 tokens x 3 of 16 experts" in out
    return path


def pairs_of(trace: RoutingTrace, iteration: int, layer: int) -> np.ndarray:
    """Token-expert pairs from rank to rank, counted one by one."""
    pairs_GG = np.zeros((RANKS, RANKS), np.int64)
    for source in range(RANKS):
        for token in trace.expert_ids[iteration, layer, source]:
            for expert in token:
                pairs_GG[source, int(expert) // (EXPERTS // RANKS)] += 1
    return pairs_GG


def export(hiermoe: Command, trace: Path, system: str, output: Path, *options: str) -> tuple[int, str, str]:
    sizes = ["--row-bytes", str(ROW_BYTES), "--tokens-per-rank", str(TOKENS), "--cluster", "a6000_1x8"]
    return hiermoe("trace", "export-matrix", str(trace), "--system", system, "--output", str(output), *sizes, *options)


@pytest.mark.parametrize("names", [["npy"], []], ids=["named", "found out"])
def test_options_may_stand_between_the_form_and_the_file(hiermoe: Command, tmp_path: Path, names: list[str]) -> None:
    array = write_npy(tmp_path / "theirs.npy", some_ids(2, 12, 3, EXPERTS))
    options = ["--num-experts", str(EXPERTS), "--output", str(tmp_path / "ours.trace")]
    code, out, err = hiermoe("trace", "import", *names, *options[:2], str(array), *options[2:])
    assert code == 0 and "12 tokens x 3 of 16 experts" in out, err


def test_imported_trace_runs_like_a_recorded_one(hiermoe: Command, store: RunStore, trace: Path) -> None:
    code, out, err = hiermoe(
        "run", "system=hiermoe", "cluster=a6000_1x8", "routing=recorded", f"routing.source.path={trace}",
        "model.num_experts=16", "model.topk=3", "iterations=4", "tokens_per_rank=6", "wandb.mode=disabled",
    )  # fmt: skip
    assert code == 0, err
    assert "HierMoE" in out


def test_matrix_of_megatron_holds_the_bytes_of_every_pair(hiermoe: Command, trace: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "matrix.txt"
    code, out, _ = export(hiermoe, trace, "megatron", output, "--iteration", "2", "--layer", "1")
    assert code == 0
    expected = pairs_of(RoutingTrace.load(trace), iteration=2, layer=1) * ROW_BYTES
    np.testing.assert_array_equal(np.loadtxt(output, dtype=np.int64), expected)
    largest = max(expected.sum(0).max(), expected.sum(1).max())
    assert f"NCCL_TESTS_ALLTOALLV_MATRIX_FILE={output} alltoallv_perf -b {largest} -e {largest}" in out


def test_staged_system_gives_a_matrix_a_stage(hiermoe: Command, trace: Path, tmp_path: Path) -> None:
    code, _, _ = export(hiermoe, trace, "hd2", tmp_path / "m.txt")
    assert code == 0
    first, second = (np.loadtxt(tmp_path / f"m.stage{i}.txt", dtype=np.int64) for i in (1, 2))
    halves = np.arange(RANKS) // 4
    assert (second[halves[:, None] != halves[None, :]] == 0).all(), "the last stage stays inside a group"
    assert (first[np.arange(RANKS)[:, None] % 4 != np.arange(RANKS)[None, :] % 4] == 0).all(), "the first keeps lanes"
    assert first.sum() < RANKS * TOKENS * 3 * ROW_BYTES


@pytest.mark.parametrize(
    ("system", "options", "message"),
    [
        ("megatron", ["--iteration", "4"], "iteration=4 is outside 0..3"),
        ("megatron", ["--layer", "2"], "layer=2 is not among the trace's 2 layers"),
        ("megatron", ["--topk", "4"], "topk=4 exceeds the 3 experts per token that the trace recorded"),
        ("megatron", ["--row-bytes", "0"], "row_bytes=0 must be at least 1"),
        ("megatron", ["--tokens-per-rank", "1000"], "has 192 tokens, one iteration asks 8000"),
        ("megatron", ["--cluster", "nowhere"], "cluster=nowhere is unknown"),
        ("nothing", [], "system=nothing is unknown"),
        ("hd4", [], "dimension=4 is outside"),
    ],
)
def test_matrix_that_cannot_be_made(
    system: str, options: list[str], message: str, hiermoe: Command, trace: Path, tmp_path: Path
) -> None:
    code, out, err = export(hiermoe, trace, system, tmp_path / "m.txt", *options)
    assert code == 2
    assert message in err and len(err.strip().splitlines()) == 1 and out == ""
    assert not list(tmp_path.glob("m*.txt"))


def test_show_gives_shape_and_what_is_unknown(hiermoe: Command, trace: Path) -> None:
    code, out, _ = hiermoe("trace", "show", str(trace), "--cluster", "a6000_1x8")
    assert code == 0
    assert "4 iterations x 2 layers x 8 ranks" in out and "unknown" in out and "theirs.npy" in out


def test_loads_and_duplication_leave_padding_out() -> None:
    counts = [[5, 0], [3, 2], [1, 5]]
    trace = a_trace(num_tokens=counts)
    _, rows = show(trace, Cluster.named("a6000_1x8"))
    cells = [list(column.cells) for column in rows.columns]
    for layer in range(2):
        tokens = [trace.expert_ids[i, layer, g, t, :2] for i in range(3) for g in range(2) for t in range(counts[i][g])]
        loads = np.bincount(np.concatenate(tokens), minlength=16)
        assert cells[3][layer] == f"{loads.max() / loads.mean():.2f}"
        assert cells[4][layer] == str((loads == 0).sum())
        distinct = sum(len({int(expert) // 2 for expert in token}) for token in tokens)
        assert str(cells[-1][layer]).startswith(f"{1 - distinct / (2 * len(tokens)):.1%}\n(")


def test_matrix_of_gpus_that_do_not_divide_the_experts_says_which_do(
    hiermoe: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array, path = write_npy(tmp_path / "a.npy", some_ids(1, 64, 3, 20)), tmp_path / "a.trace"
    hiermoe("trace", "import", "npy", str(array), "--output", str(path), "--num-experts", "20")
    code, out, _ = export(hiermoe, path, "megatron", tmp_path / "m.txt")
    assert code == 0
    assert "20 experts do not divide over 8 GPUs: 3 on 4 of them, 2 on the others; 1, 2, 4, 5, 10, 20 divide" in out
    code, _, err = export(hiermoe, path, "megatron", tmp_path / "n.txt", "--cluster", "a6000_4x8")
    assert code == 2 and "num_experts=20 is smaller than ep_size=32" in err and "1, 2, 4, 5, 10, 20 divide it" in err


@pytest.mark.parametrize(("system", "stages"), [("megatron", 1), ("hd2", 2)])
def test_matrix_of_ragged_ranks_equals_a_count_token_by_token(
    system: str, stages: int, hiermoe: Command, tmp_path: Path
) -> None:
    counts = np.random.default_rng(0).integers(0, 8, (6, 3))
    ragged = a_trace((6, 1, 3, 7), num_tokens=counts.tolist())
    ragged.save(tmp_path / "a.trace")
    sizes = ["--tokens-per-rank", "4", "--iteration", "1", "--topk", "3"]
    code, _, err = export(hiermoe, tmp_path / "a.trace", system, tmp_path / "m.txt", *sizes)
    assert code == 0, err
    tokens = [ragged.expert_ids[i, 0, g, t, :3] for i in range(6) for g in range(3) for t in range(counts[i, g])]
    step = tokens[RANKS * 4 : 2 * RANKS * 4]
    expected = np.zeros((stages, RANKS, RANKS), np.int64)
    for n, experts in enumerate(step):
        source, targets = n // 4, sorted({int(expert) // 2 for expert in experts})
        if system == "megatron":
            for expert in experts:
                expected[0, source, int(expert) // 2] += 1
            continue
        for half in {target // 4 for target in targets}:  # once to each half, to the GPU of its own lane
            relay = 4 * half + source % 4
            expected[0, source, relay] += 1
            for target in [target for target in targets if target // 4 == half]:
                expected[1, relay, target] += 1
    files = [tmp_path / "m.txt"] if stages == 1 else [tmp_path / f"m.stage{i}.txt" for i in (1, 2)]
    for file, rows_GG in zip(files, expected, strict=True):
        np.testing.assert_array_equal(np.loadtxt(file, dtype=np.int64), rows_GG * ROW_BYTES)


def test_ragged_trace_is_advised_on_and_run(hiermoe: Command, store: RunStore, tmp_path: Path) -> None:
    a_trace((6, 1, 3, 7), num_tokens=np.random.default_rng(0).integers(0, 8, (6, 3)).tolist()).save(
        tmp_path / "a.trace"
    )
    sizes = ["cluster=a6000_1x8", "tokens_per_rank=2", "iterations=4"]
    code, out, err = hiermoe(
        "run", "system=hiermoe", "routing=recorded", f"routing.source.path={tmp_path}/a.trace", *sizes,
        "model.num_experts=16", "model.topk=2", "wandb.mode=disabled",
    )  # fmt: skip
    assert code == 0 and "HierMoE" in out, err
    code, out, err = hiermoe(
        "advise", f"trace={tmp_path}/a.trace", *sizes, "hidden_size=64", "moe_ffn_hidden_size=64", "systems=[hd2]",
        f"output={tmp_path}/page",
    )  # fmt: skip
    assert code == 0 and "regrouped" in out, err


def test_collapsed_routing_is_said_beside_its_gain(hiermoe: Command, tmp_path: Path) -> None:
    array, path = write_npy(tmp_path / "a.npy", some_ids(1, 2048, 4, 8)), tmp_path / "a.trace"
    code, imported, _ = hiermoe("trace", "import", "npy", str(array), "--output", str(path), "--num-experts", "128")
    said = "99% of all choices fall on 8 of 128 experts, 120 are never chosen"
    assert code == 0 and f"Routing of layer 0 has collapsed: {said}." in imported
    code, out, _ = hiermoe("trace", "show", str(path))
    assert code == 0 and f"Routing of layer 0 has collapsed: {said}." in " ".join(out.split())
    sizes = ["cluster=a6000_1x8", "tokens_per_rank=32", "iterations=8", "hidden_size=64", "moe_ffn_hidden_size=64"]
    code, out, err = hiermoe("advise", f"trace={path}", *sizes, "systems=[hd2]", f"output={tmp_path}/page")
    assert code == 0, err
    headline = (tmp_path / "page" / "advice.md").read_text().splitlines()[2]
    assert f"But this routing has collapsed: {said}" in headline
    assert "this routing has collapsed" in re.sub(r"[\s│]+", " ", out)


def test_duplication_on_more_gpus_than_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="num_experts=16 is smaller than ep_size=32"):
        show(a_trace(), Cluster.named("a6000_4x8"))


def test_a_trace_that_is_none_is_refused(hiermoe: Command, tmp_path: Path) -> None:
    (tmp_path / "a.trace").write_text("no")
    code, _, err = hiermoe("trace", "show", str(tmp_path / "a.trace"))
    assert code == 2 and "is truncated or not a trace" in err
