"""Rows that mean no routing are no expert 0: they are left out, counted, and asked about where nothing tells."""

from pathlib import Path

import numpy as np
import pytest

from hiermoe.routing.trace import RoutingTrace
from tests.conftest import Command
from tests.routing.importers.files import record, some_ids, write_lines, write_npy, write_parquet
from tests.routing.importers.test_round_trips import flat, imported

TOKENS = 40
HOLES = np.arange(TOKENS) % 4 == 1
COUNTED = f"{HOLES.sum()} of {TOKENS} tokens, which have no routing (all -1 or 0)"


def with_holes(ids_LNK: np.ndarray, value: int) -> np.ndarray:
    return np.where(HOLES[None, :, None], value, ids_LNK)


@pytest.mark.parametrize("value", [-1, 0])
def test_tokens_without_routing_are_left_out_of_an_array(value: int, tmp_path: Path) -> None:
    ids = some_ids(tokens=TOKENS)
    trace = imported("npy", write_npy(tmp_path / "a.npy", with_holes(ids, value)))
    np.testing.assert_array_equal(flat(trace), ids[:, ~HOLES])
    assert trace.metadata.left_out == (COUNTED,)


@pytest.mark.parametrize("value", [-1, 0])
def test_tokens_without_routing_are_left_out_of_other_forms(value: int, tmp_path: Path) -> None:
    ids = some_ids(layers=1, tokens=TOKENS)
    holes = with_holes(ids, value)[0]
    rows = "".join(f"0,{expert}\n" for expert in holes.ravel())
    (tmp_path / "a.csv").write_text(rows)
    for name, path in {
        "parquet": write_parquet(tmp_path / "a.parquet", indices=holes.tolist()),
        "llama-csv": tmp_path / "a.csv",
        "megatron": write_lines(tmp_path / "a.jsonl", [record(0, 0, 0, holes)]),
    }.items():
        trace = imported(name, path, topk=3)
        np.testing.assert_array_equal(flat(trace), ids[:, ~HOLES])
        assert trace.metadata.left_out == (COUNTED,)


def test_a_token_without_routing_in_one_layer_is_left_out_of_all_and_of_its_rank(tmp_path: Path) -> None:
    ids = some_ids(layers=4, tokens=6)
    holes = ids.copy()
    holes[1, [0, 4]] = -1
    holes[2, 5] = 0
    lines = [record(0, layer, rank, holes[2 * rank + layer]) for rank in range(2) for layer in range(2)]
    trace = imported("megatron", write_lines(tmp_path / "a.jsonl", lines), pipeline=1)
    np.testing.assert_array_equal(trace.num_tokens, [[4, 5]])
    np.testing.assert_array_equal(trace.expert_ids[0, 0, 0, :4], ids[0, [1, 2, 3, 5]])
    np.testing.assert_array_equal(trace.expert_ids[0, 1, 1, :5], ids[3, :5])
    assert trace.metadata.left_out == ("3 of 12 tokens, which have no routing (all -1 or 0)",)


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("value", [-1, 0])
def test_layers_without_experts_are_left_out(topk: int, value: int, tmp_path: Path) -> None:
    ids = some_ids(layers=3, tokens=TOKENS, topk=topk) // 2 * 2 + (topk == 1)  # at K = 1 no token chooses expert 0
    ids = some_ids(layers=3, tokens=TOKENS, topk=topk) if topk > 1 else ids
    dense = ids.copy()
    dense[1] = value
    path = write_npy(tmp_path / "a.npy", dense)
    trace = imported("npy", path)
    assert trace.metadata.layers == [0, 2]
    np.testing.assert_array_equal(flat(trace), ids[[0, 2]])
    assert trace.metadata.left_out == ("layers 1, which have no routing (all -1 or 0)",)
    with pytest.raises(ValueError, match="layer 1 has no routing"):
        imported("npy", path, layers=(0, 1))


def test_zeros_of_tokens_in_many_layers_are_no_choice_at_k_1(tmp_path: Path) -> None:
    ids = some_ids(layers=8, tokens=TOKENS, topk=1)
    trace = imported("npy", write_npy(tmp_path / "a.npy", with_holes(ids, 0)))
    np.testing.assert_array_equal(flat(trace), ids[:, ~HOLES])
    assert (flat(trace) == 0).any(), "where some layer chose another expert, 0 is expert 0"
    assert trace.metadata.left_out == (COUNTED,)


@pytest.mark.parametrize("layers", [1, 2])
def test_zeros_that_may_be_choices_are_asked_about_at_k_1(layers: int, tmp_path: Path) -> None:
    ids = with_holes(np.random.default_rng(0).integers(0, 3, (layers, TOKENS, 1)), 0)
    path = write_npy(tmp_path / "a.npy", ids)
    zeros = int((ids == 0).all(axis=0).sum())
    with pytest.raises(ValueError, match=f"K=1, and {zeros} of {TOKENS} tokens are 0 in every layer.*say --zeros"):
        imported("npy", path)
    np.testing.assert_array_equal(flat(imported("npy", path, zeros="expert")), ids)
    kept = ~(ids == 0).all(axis=(0, 2))
    np.testing.assert_array_equal(flat(imported("npy", path, zeros="none")), ids[:, kept])


def test_rows_of_forms_that_hold_nothing_else_are_choices_at_k_1(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("0,0\n0,3\n0,0\n")
    np.testing.assert_array_equal(flat(imported("llama-csv", tmp_path / "a.csv", topk=1)), [[[0], [3], [0]]])


def test_room_for_more_experts_than_k_is_no_expert(tmp_path: Path) -> None:
    ids = some_ids(tokens=TOKENS)
    wide = np.concatenate([ids, np.full((2, TOKENS, 2), -1)], axis=2)
    trace = imported("npy", write_npy(tmp_path / "a.npy", with_holes(wide, -1)))
    np.testing.assert_array_equal(flat(trace), ids[:, ~HOLES])


def test_nothing_but_holes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layer 0 has no routing"):
        imported("npy", write_npy(tmp_path / "a.npy", np.full((2, 5, 3), -1)))
    halves = np.array([[[1, 2], [-1, -1]], [[-1, -1], [1, 2]]])
    with pytest.raises(ValueError, match="every token is without routing"):
        imported("npy", write_npy(tmp_path / "a.npy", halves))


def test_what_was_left_out_is_said(tmp_path: Path, hiermoe: Command) -> None:
    path = write_npy(tmp_path / "a.npy", with_holes(some_ids(tokens=TOKENS), -1))
    output = tmp_path / "a.trace"
    code, out, _ = hiermoe("trace", "import", "npy", str(path), "--output", str(output), "--num-experts", "16")
    assert code == 0 and f"left out: {COUNTED}" in out
    assert RoutingTrace.load(output).metadata.left_out == (COUNTED,)
    code, out, _ = hiermoe("trace", "show", str(output), "--cluster", "a6000_1x8")
    assert code == 0 and "left out" in out
