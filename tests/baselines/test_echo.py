"""ECHO's clones against spills and rooms that are laid along a line token by token."""

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.echo import EchoPolicy
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.baselines.counted import Shares, at_home, context, imbalance, random_home, random_pairs, routed_pairs, shares
from tests.planner.cases import examples


def reference(pairs_GE: torch.Tensor, home: Placement, spare: int) -> Shares:
    ranks, counts = len(pairs_GE), pairs_GE.tolist()
    load = [sum(column) for column in zip(*counts, strict=True)]
    at = home.rank_of(ranks).tolist()
    mean = (sum(load) + ranks - 1) // ranks
    spilled, rooms = Counter[int](), dict[int, int]()
    for rank in range(ranks):
        mine = sorted((e for e in range(len(load)) if at[e] == rank), key=lambda e: (load[e], e))
        line = [e for e in mine for _ in range(load[e])]
        spilled.update(line[mean:])
        rooms[rank] = max(mean - len(line), 0)
    tokens = [e for e in sorted(spilled, key=lambda e: (-spilled[e], e)) for _ in range(spilled[e])]
    places = [rank for rank in sorted(rooms, key=lambda rank: (-rooms[rank], rank)) for _ in range(rooms[rank])]
    overlaps = Counter(zip(tokens, places, strict=False))  # in the order of the line
    found = Counter[tuple[int, int, int]](at_home(pairs_GE, home))
    for rank in range(ranks):
        mine = [(expert, n) for (expert, there), n in overlaps.items() if there == rank]
        for expert, n in sorted(mine, key=lambda one: -one[1])[:spare]:
            part = {s: min(n * counts[s][expert] // load[expert], found[s, expert, at[expert]]) for s in range(ranks)}
            while sum(part.values()) < n:
                part[min(s for s in part if part[s] < found[s, expert, at[expert]])] += 1
            for source, taken in part.items():
                found[source, expert, rank] += taken
                found[source, expert, at[expert]] -= taken
    return {key: n for key, n in found.items() if n}


@given(
    ranks=st.integers(1, 8), per_rank=st.integers(1, 4), spare=st.integers(1, 3), most=st.sampled_from([1, 30, 300]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
@examples(120)
def test_plan_equals_the_reference(ranks: int, per_rank: int, spare: int, most: int, seed: int) -> None:
    pairs_GE, home = random_pairs(ranks, ranks * per_rank, most, seed), random_home(ranks, per_rank, seed)
    found = shares(EchoPolicy(spare).rebalance(pairs_GE, home, context(Hierarchy((ranks,)))), pairs_GE, home)
    assert found == reference(pairs_GE, home, spare)


def test_more_slots_balance_better() -> None:
    pairs_GE, home = routed_pairs(16, 64, 512, 4, 1.0), Placement.identity(64)
    one, four = (
        imbalance(shares(EchoPolicy(spare).rebalance(pairs_GE, home, context(Hierarchy((2, 16)))), pairs_GE, home), 16)
        for spare in (1, 4)
    )
    assert four < 1.01 < one < imbalance(at_home(pairs_GE, home), 16)
