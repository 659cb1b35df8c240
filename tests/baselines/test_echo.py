"""ECHO's clones against spills and rooms token by token: along a line, and matched in rounds after a plan of lists."""

import math
from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.echo import EchoPolicy
from baselines.echo_sinkhorn import EchoSinkhornPolicy
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.baselines.counted import (
    Shares,
    at_home,
    context,
    imbalance,
    random_home,
    random_pairs,
    routed_pairs,
    shares,
)
from tests.planner.cases import examples, hierarchies

Moves = list[tuple[int, int, int]]  # expert, GPU, tokens


def reference(pairs_GE: torch.Tensor, home: Placement, spare: int) -> Shares:
    """Along one line; every GPU's largest clones."""
    spilled, rooms = spills_and_rooms(pairs_GE, home)
    tokens = [e for e in sorted(spilled, key=lambda e: (-spilled[e], e)) for _ in range(spilled[e])]
    places = [rank for rank in sorted(rooms, key=lambda rank: (-rooms[rank], rank)) for _ in range(rooms[rank])]
    overlaps = Counter(zip(tokens, places, strict=False))  # in the order of the line
    moves: Moves = []
    for rank in range(len(pairs_GE)):
        mine = [(expert, rank, n) for (expert, there), n in overlaps.items() if there == rank]
        moves += sorted(mine, key=lambda one: -one[2])[:spare]
    return shared(pairs_GE, home, moves)


def matched_reference(pairs_GE: torch.Tensor, home: Placement, spare: int, node: int) -> Shares:
    """In rounds, by what a match and a plan move; ``node`` GPUs are one."""
    spilled, rooms = spills_and_rooms(pairs_GE, home)
    at = home.rank_of(len(pairs_GE)).tolist()
    spills, free = {e: n for e, n in spilled.items() if n}, {rank: n for rank, n in rooms.items() if n}
    if not spills:
        return at_home(pairs_GE, home)
    free_in_all, nobody = sum(free.values()), -1
    line = {**spills, nobody: free_in_all - sum(spills.values())}
    is_near = {(e, r): e != nobody and at[e] // node == r // node for e in line for r in free}
    kernel = {pair: math.exp(-(1 if near else 3) / 3) for pair, near in is_near.items()}
    left, right = dict.fromkeys(line, 1.0), dict.fromkeys(free, 1.0)
    for _ in range(50):
        left = {e: n / sum(kernel[e, r] * right[r] for r in free) for e, n in line.items()}
        right = {r: n / sum(kernel[e, r] * left[e] for e in line) for r, n in free.items()}
    planned = {(e, r): left[e] * kernel[e, r] * right[r] for e, r in kernel}
    for e, n in line.items():  # it is a plan
        assert sum(planned[e, r] for r in free) == pytest.approx(n, rel=1e-6, abs=1e-6)
    bonus = {pair: math.floor(n + 1e-6) + (0.5 if is_near[pair] else 0) for pair, n in planned.items()}
    biggest = (sorted(spills, key=lambda e: (-spills[e], e)), sorted(free, key=lambda r: (-free[r], r)))
    order = {pair: number for number, pair in enumerate(product(*biggest))}
    moves: Moves = []
    for _ in range(spare):
        waiting = set(free)
        while match := [(e, r) for e, r in order if r in waiting and spills[e] and free[r]]:
            e, r = max(match, key=lambda one: (min(spills[one[0]], free[one[1]]) + bonus[one], -order[one]))
            moves.append((e, r, min(spills[e], free[r])))
            spills[e], free[r] = spills[e] - moves[-1][2], free[r] - moves[-1][2]
            waiting.remove(r)
    return shared(pairs_GE, home, moves)


def spills_and_rooms(pairs_GE: torch.Tensor, home: Placement) -> tuple[Counter[int], dict[int, int]]:
    """Tokens of experts above the mean, and of GPUs below it."""
    ranks, load = len(pairs_GE), pairs_GE.sum(0).tolist()
    at = home.rank_of(ranks).tolist()
    mean = (sum(load) + ranks - 1) // ranks
    spilled, rooms = Counter[int](), dict[int, int]()
    for rank in range(ranks):
        mine = sorted((e for e in range(len(load)) if at[e] == rank), key=lambda e: (load[e], e))
        line = [e for e in mine for _ in range(load[e])]
        spilled.update(line[mean:])
        rooms[rank] = max(mean - len(line), 0)
    return spilled, rooms


def shared(pairs_GE: torch.Tensor, home: Placement, moves: Moves) -> Shares:
    """A clone's tokens by the counts of the sources, rounded down, the rest from the first that have any."""
    counts, ranks = pairs_GE.tolist(), len(pairs_GE)
    load, at = pairs_GE.sum(0).tolist(), home.rank_of(ranks).tolist()
    found = Counter[tuple[int, int, int]](at_home(pairs_GE, home))
    for expert, rank, n in moves:
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


@given(
    hierarchy=hierarchies(depths=(1, 3), most_ranks=12), per_rank=st.integers(1, 4), spare=st.integers(1, 3),
    most=st.sampled_from([1, 30, 300]), seed=st.integers(0, 10**6),
)  # fmt: skip
@examples(120)
def test_matches_equal_the_reference(hierarchy: Hierarchy, per_rank: int, spare: int, most: int, seed: int) -> None:
    ranks = hierarchy.num_ranks
    pairs_GE, home = random_pairs(ranks, ranks * per_rank, most, seed), random_home(ranks, per_rank, seed)
    found = shares(EchoSinkhornPolicy(spare).rebalance(pairs_GE, home, context(hierarchy)), pairs_GE, home)
    node = hierarchy.lanes(1) if hierarchy.depth > 1 else ranks
    assert found == matched_reference(pairs_GE, home, spare, node)


def test_of_equal_rooms_the_one_in_the_own_node_is_matched_first() -> None:
    hierarchy, home = Hierarchy((2, 4), ("node", "gpu")), Placement.identity(4)
    pairs_GE = torch.tensor([[5, 5, 5, 15]] * 4)  # 20, 20, 20, 60: GPU 3 spills 30 to rooms of 10, GPU 2 is near
    clones = [(3, 2, 10), (3, 0, 10), (3, 1, 10)]
    policy, found = EchoSinkhornPolicy(1), spills_and_rooms(pairs_GE, home)
    spills, rooms = [(n, e) for e, n in found[0].items()], [(n, rank) for rank, n in found[1].items() if n]
    assert policy.clones(spills, rooms, home.rank_of(4), hierarchy) == clones
    assert EchoPolicy(1).clones(spills, rooms, home.rank_of(4), hierarchy) == sorted(clones, key=lambda one: one[1])
    assert policy.clones([], rooms, home.rank_of(4), hierarchy) == []


@pytest.mark.parametrize("policy", [EchoPolicy, EchoSinkhornPolicy])
def test_more_slots_balance_better(policy: type[EchoPolicy]) -> None:
    pairs_GE, home = routed_pairs(16, 64, 512, 4, 1.0), Placement.identity(64)
    one, four = (
        imbalance(shares(policy(spare).rebalance(pairs_GE, home, context(Hierarchy((2, 16)))), pairs_GE, home), 16)
        for spare in (1, 4)
    )
    assert four < 1.01 < one < imbalance(at_home(pairs_GE, home), 16)
