"""Each stress mode does to the load what it claims."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hiermoe.planner.counts import count_routing
from hiermoe.routing.step import RoutingSource, RoutingStep
from hiermoe.routing.stress import (
    Balanced,
    burst,
    empty,
    hot_adjacent,
    hot_rank,
    hot_spread,
    ragged,
    rotating,
)
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.routing.worlds import a_request

LEVELS = Hierarchy((4, 8, 16, 32))


def load(step: RoutingStep) -> Tensor:
    """Token-expert pairs of every expert: int64 [E]."""
    return torch.bincount(step.expert_ids_NK.flatten(), minlength=step.num_experts)


def rank_load(step: RoutingStep) -> Tensor:
    """Token-expert pairs that every GPU receives: int64 [G]."""
    return load(step).view(step.num_ranks, -1).sum(1)


def hottest(source: RoutingSource, iteration: int, number: int) -> set[int]:
    return set(load(source.step(iteration)).topk(number).indices.tolist())


@given(
    data=st.data(),
    num_experts=st.integers(1, 24),
    num_ranks=st.integers(1, 4),
    tokens=st.integers(1, 24),
    iteration=st.integers(0, 9),
)
@settings(max_examples=150, derandomize=True, deadline=None)
def test_balanced_load_is_exactly_equal_where_it_can_be(
    data: st.DataObject, num_experts: int, num_ranks: int, tokens: int, iteration: int
) -> None:
    topk = data.draw(st.integers(1, num_experts))
    request = a_request(num_experts=num_experts, topk=topk, num_ranks=num_ranks, tokens_per_rank=tokens)
    step = Balanced(request).step(iteration)
    load_E = load(step)
    divisible = num_ranks * tokens * topk % num_experts == 0
    assert int(load_E.max() - load_E.min()) == (0 if divisible else 1)
    assert all(len(set(row)) == topk for row in step.expert_ids_NK.tolist())


def test_balanced_experts_do_not_fire_together_more_than_by_chance() -> None:
    source = Balanced(a_request(tokens_per_rank=512))
    pairs_EE = torch.zeros(128, 128)
    for i in range(4):
        ids_NK = source.step(i).expert_ids_NK
        chosen_NE = torch.zeros(len(ids_NK), 128).scatter(1, ids_NK, 1.0)
        pairs_EE += chosen_NE.T @ chosen_NE
    others = pairs_EE[~torch.eye(128, dtype=torch.bool)]
    expected = 4 * 32 * 512 * 8 * 7 / (128 * 127)
    assert float(others.mean()) == pytest.approx(expected)
    assert float(others.std()) == pytest.approx(expected**0.5, rel=0.1)  # as of independent draws


def test_hot_experts_side_by_side_load_few_gpus_and_spread_ones_many() -> None:
    adjacent, spread = (make(a_request(), num_hot=8, heat=16.0) for make in (hot_adjacent, hot_spread))
    assert hottest(adjacent, 0, 8) == set(range(8))
    assert hottest(spread, 0, 8) == set(range(0, 128, 16))
    assert {e // 4 for e in hottest(adjacent, 0, 8)} == {0, 1}
    assert len({e // 4 for e in hottest(spread, 0, 8)}) == 8
    for source in (adjacent, spread):
        hot = load(source.step(0)).sort(descending=True).values
        assert float(hot[:8].float().mean()) > 5 * float(hot[8:].float().mean())
    totals = [int(load(source.step(0)).topk(8).values.sum()) for source in (adjacent, spread)]
    assert totals[0] == pytest.approx(totals[1], rel=0.03)  # the same demand, placed differently
    assert int(rank_load(adjacent.step(0)).max()) > 2 * int(rank_load(spread.step(0)).max())


@pytest.mark.parametrize("num_hot", [3, 8, 12, 31, 32, 50])
def test_spread_hot_experts_reach_as_many_gpus_as_possible(num_hot: int) -> None:
    weights_E = hot_spread(a_request(), num_hot, heat=2.0).weights_CE[0]
    hot = (weights_E == 2.0).nonzero().flatten()
    assert len(hot) == num_hot
    assert len(set((hot // 4).tolist())) == min(num_hot, 32)


def test_hot_rank_receives_most_and_nearly_every_token() -> None:
    step = hot_rank(a_request(), heat=16.0).step(0)
    load_G = rank_load(step)
    assert int(load_G.argmax()) == 0
    assert int(load_G[0]) > 5 * int(load_G[1:].max())
    counts = count_routing(step, Placement.identity(128), LEVELS)
    assert int(counts.tokens[-1][:, 0].sum()) > 0.9 * 32 * 64


def test_ragged_ranks_hold_from_no_token_to_all() -> None:
    source = ragged(a_request())
    held = [torch.bincount(source.step(i).source_N, minlength=32) for i in range(6)]
    assert (held[0].diff() > 0).all()
    assert (int(held[0][0]), int(held[0][-1])) == (0, 64)
    assert held[1].tolist() == [64 if rank == 16 else 0 for rank in range(32)]
    assert torch.equal(held[2], held[0].flip(0))
    assert all(torch.equal(held[i], held[i + 3]) for i in range(3))


def test_ragged_leaves_a_single_rank_its_token_counts() -> None:
    source = ragged(a_request(num_ranks=1))
    assert [len(source.step(i).source_N) for i in range(3)] == [0, 64, 0]


def test_empty_experts_and_ranks_get_no_load_but_send() -> None:
    step = empty(a_request(), idle_share=0.25).step(0)
    load_GL = load(step).view(32, 4)
    assert int(load_GL[24:].sum()) == 0
    assert int(load_GL[:, 0].sum()) == 0
    assert (load_GL[:24, 1:] > 0).all()
    assert torch.bincount(step.source_N).tolist() == [64] * 32


def test_empty_with_one_expert_a_gpu_idles_whole_gpus_only() -> None:
    load_E = load(empty(a_request(num_experts=32), idle_share=0.25).step(0))
    assert (load_E > 0).tolist() == [True] * 24 + [False] * 8


def test_rotating_hot_spot_stays_then_moves_on_and_comes_back() -> None:
    source = rotating(a_request(), num_hot=48, heat=16.0, every=2)
    for iteration in (0, 1, 2, 3, 4, 15, 16):
        start = iteration // 2 * 48 % 128
        assert hottest(source, iteration, 48) == {(start + i) % 128 for i in range(48)}


def test_burst_is_uniform_but_for_its_last_iterations() -> None:
    source = burst(a_request(), num_hot=8, heat=16.0, period=5, length=2)
    hot_share = [float(load(source.step(i))[:8].sum()) / (32 * 64 * 8) for i in range(10)]
    assert [share > 0.3 for share in hot_share] == [False, False, False, True, True] * 2
    assert max(share for share in hot_share if share <= 0.3) < 0.08


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: hot_adjacent(r, 0, 2.0), r"num_hot=0 is outside 1\.\.num_experts=128"),
        (lambda r: hot_spread(r, 129, 2.0), r"num_hot=129 is outside 1\.\.num_experts=128"),
        (lambda r: rotating(r, -1, 2.0, 1), r"num_hot=-1 is outside 1\.\.num_experts=128"),
        (lambda r: hot_rank(r, 0.5), r"heat=0\.5 must be at least 1"),
        (lambda r: hot_rank(a_request(num_experts=100), 2.0), "num_experts=100 is not divisible by ep_size=32"),
        (lambda r: rotating(r, 8, 2.0, 0), "every=0 must be at least 1"),
        (lambda r: burst(r, 8, 2.0, period=4, length=4), r"length=4 is outside 1\.\.3, below period=4"),
        (lambda r: burst(r, 8, 2.0, period=4, length=0), r"length=0 is outside 1\.\.3, below period=4"),
        (lambda r: empty(r, 1.0), r"idle_share=1\.0 is outside \[0, 1\)"),
        (lambda r: empty(r, 0.95), "stress_empty: 6 experts may get load, fewer than topk=8"),
    ],
)
def test_parameter_outside_its_range_is_refused(make: Callable[..., RoutingSource], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(a_request())
