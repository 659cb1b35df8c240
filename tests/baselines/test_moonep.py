"""MoonEP's plan: equal loads, one donor each, and tokens that are cut from lists."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.moonep import MoonEPPolicy
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.baselines.counted import (
    Shares,
    at_home,
    context,
    guests,
    imbalance,
    in_ranges,
    loads,
    random_home,
    random_pairs,
    routed_pairs,
    shares,
)
from tests.planner.cases import examples


def reference(pairs_GE: torch.Tensor, home: Placement) -> Shares:
    ranks, load = len(pairs_GE), [sum(column) for column in zip(*pairs_GE.tolist(), strict=True)]
    at = home.rank_of(ranks).tolist()
    each, more = divmod(sum(load), ranks)
    over = {rank: sum(n for e, n in enumerate(load) if at[e] == rank) - each - (rank < more) for rank in range(ranks)}
    gifts: list[tuple[int, int, int]] = []  # donor, receiver, tokens
    while any(n > 0 for n in over.values()):
        donor = sorted(over, key=lambda rank: (-over[rank], rank))[0]
        receiver = sorted(over, key=lambda rank: (over[rank], rank))[0]
        gifts.append((donor, receiver, -over[receiver]))
        over[donor], over[receiver] = over[donor] + over[receiver], 0
    amounts = [{at[e]: n} for e, n in enumerate(load)]
    for donor in range(ranks):
        wanted = {receiver: n for giver, receiver, n in gifts if giver == donor}
        own = {e: n for e, n in enumerate(load) if at[e] == donor}
        while sum(wanted.values()):
            receiver = sorted(wanted, key=lambda rank: (-wanted[rank], rank))[0]
            expert = sorted(own, key=lambda e: (-own[e], e))[0]
            part = min(wanted[receiver], own[expert])
            wanted[receiver], own[expert] = wanted[receiver] - part, own[expert] - part
            amounts[expert][receiver] = amounts[expert].get(receiver, 0) + part
            amounts[expert][donor] -= part
    return in_ranges(pairs_GE, amounts)


@given(
    ranks=st.integers(1, 9), per_rank=st.integers(1, 4), most=st.sampled_from([1, 30, 400]), seed=st.integers(0, 10**6)
)
@examples(120)
def test_plan_equals_the_reference(ranks: int, per_rank: int, most: int, seed: int) -> None:
    pairs_GE, home = random_pairs(ranks, ranks * per_rank, most, seed), random_home(ranks, per_rank, seed)
    found = shares(MoonEPPolicy().rebalance(pairs_GE, home, context(Hierarchy((ranks,)))), pairs_GE, home)
    assert found == reference(pairs_GE, home)
    total = loads(found, ranks)
    assert max(total) - min(total) <= 1
    rank_E = home.rank_of(ranks).tolist()
    for mine in guests(found, home, ranks).values():
        assert len({rank_E[expert] for expert in mine}) <= 1 and len(mine) <= per_rank


def test_of_equal_rooms_the_lower_gpu_takes_the_largest_expert() -> None:
    pairs_GE, home = torch.tensor([[5, 4, 0, 0, 0, 0]] * 3), Placement.identity(6)
    found = shares(MoonEPPolicy().rebalance(pairs_GE, home, context(Hierarchy((3,)))), pairs_GE, home)
    assert found == reference(pairs_GE, home)
    assert guests(found, home, 3) == {0: set(), 1: {0}, 2: {1}}


@pytest.mark.parametrize("skew", [0.3, 2.0])
def test_every_gpu_computes_exactly_as_many_pairs_as_its_tokens_have(skew: float) -> None:
    pairs_GE, home = routed_pairs(8, 64, 512, 6, skew), Placement.identity(64)
    assert imbalance(at_home(pairs_GE, home), 8) > 1.1
    found = shares(MoonEPPolicy().rebalance(pairs_GE, home, context(Hierarchy((2, 8)))), pairs_GE, home)
    assert loads(found, 8) == [512 * 6] * 8
