"""LLEP's chunks against a table of assigned and pending tokens, and tokens that are handed out one by one."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.llep import LLEPPolicy
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.baselines.counted import (
    Shares,
    at_home,
    context,
    imbalance,
    in_ranges,
    random_home,
    random_pairs,
    routed_pairs,
    shares,
)
from tests.planner.cases import examples


def reference(
    pairs_GE: torch.Tensor, home: Placement, threshold: float, alpha: float, fewest: int, spare: int | None
) -> Shares:
    ranks, load = len(pairs_GE), [sum(column) for column in zip(*pairs_GE.tolist(), strict=True)]
    at = home.rank_of(ranks).tolist()
    native = [sum(n for e, n in enumerate(load) if at[e] == rank) for rank in range(ranks)]
    mean = sum(load) / ranks
    if max(native) < threshold * mean:
        return at_home(pairs_GE, home)
    cap = math.ceil(alpha * sum(load) / ranks)
    given: Counter[tuple[int, int]] = Counter()
    pending = dict(enumerate(load))

    def room(rank: int) -> int:
        waits = sum(n for e, n in pending.items() if at[e] == rank)
        return cap - waits - sum(n for (_, there), n in given.items() if there == rank)

    def may(rank: int, expert: int) -> bool:
        hosted = {e for (e, there), n in given.items() if there == rank and n and at[e] != rank}
        return rank == at[expert] or expert in hosted or spare is None or len(hosted) < spare

    for expert in sorted(pending, key=lambda e: (-load[e], e)):
        rest = pending.pop(expert)
        order = sorted((rank for rank in range(ranks) if rank != at[expert]), key=lambda rank: (-room(rank), rank))
        for rank in [at[expert], *order]:
            part = min(rest, max(room(rank), 0))
            if may(rank, expert) and part and (rank == at[expert] or part >= fewest or part == rest):
                given[expert, rank] += part
                rest -= part
        if rest:
            given[expert, min((r for r in range(ranks) if may(r, expert)), key=lambda r: (-room(r), r))] += rest
    amounts = [{rank: n for (e, rank), n in given.items() if e == expert and n} for expert in range(len(load))]
    return in_ranges(pairs_GE, amounts)


@given(
    ranks=st.integers(2, 8), per_rank=st.integers(1, 4), spare=st.sampled_from([None, 1, 2]),
    fewest=st.sampled_from([1, 10, 1024]), alpha=st.sampled_from([1.0, 1.2]), most=st.sampled_from([1, 30, 400]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
@examples(120)
def test_plan_equals_the_reference(
    ranks: int, per_rank: int, spare: int | None, fewest: int, alpha: float, most: int, seed: int
) -> None:
    pairs_GE, home = random_pairs(ranks, ranks * per_rank, most, seed), random_home(ranks, per_rank, seed)
    policy = LLEPPolicy(spare, alpha=alpha, min_tokens=fewest)
    found = shares(policy.rebalance(pairs_GE, home, context(Hierarchy((ranks,)))), pairs_GE, home)
    assert found == reference(pairs_GE, home, 1.3, alpha, fewest, spare)


@pytest.mark.parametrize(
    ("ranks", "load"),
    [(4, [5, 3, 3, 20, 5, 40, 40, 8]), (4, [1, 5, 20, 8, 5, 20, 1, 1, 40, 40, 8, 8])],
)
def test_a_gpu_without_a_free_slot_takes_more_of_its_guests_alone(ranks: int, load: list[int]) -> None:
    """Where nobody has room, the least loaded is one of those that can still take the expert."""
    pairs_GE = torch.zeros(ranks, len(load), dtype=torch.int64)
    pairs_GE[0], home = torch.tensor(load), Placement.identity(len(load))
    policy = LLEPPolicy(1, threshold=1.0, min_tokens=1)
    found = shares(policy.rebalance(pairs_GE, home, context(Hierarchy((ranks,)))), pairs_GE, home)
    assert found == reference(pairs_GE, home, 1.0, 1.0, 1, 1)


def test_below_lambda_experts_stay() -> None:
    home = Placement.identity(4)
    pairs_GE = torch.tensor([[64, 0, 35, 0], [1, 0, 0, 0]])  # 65 and 35: 1.3 times the mean
    at_lambda, below = pairs_GE, pairs_GE + torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]])
    policy = LLEPPolicy(min_tokens=1)
    assert policy.rebalance(below, home, context(Hierarchy((2,)))) is None
    assert policy.rebalance(at_lambda, home, context(Hierarchy((2,)))) is not None


def test_a_single_hot_expert_is_spread_to_the_mean() -> None:
    pairs_GE, home = routed_pairs(8, 32, 4096, 1, 0.0), Placement.identity(32)
    pairs_GE[:, 5] += 20 * 4096  # 95 % of all
    assert imbalance(at_home(pairs_GE, home), 8) > 7.6
    found = shares(LLEPPolicy().rebalance(pairs_GE, home, context(Hierarchy((8,)))), pairs_GE, home)
    assert imbalance(found, 8) < 1.01


def test_cap_below_the_mean_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha=0.9 must be at least 1"):
        LLEPPolicy(alpha=0.9)
