"""Copies that pay, against plain loops over GPUs, links and tokens."""

from collections import Counter
from itertools import product

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiermoe.planner.counts import separating_level
from hiermoe.policies.copy_plan import Copy, Demand, Prefixes, copies_in_order, priced_copies, with_copies
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.baselines.counted import random_home, random_pairs, shares
from tests.planner.cases import examples, hierarchies


def random_demand(hierarchy: Hierarchy, per_rank: int, seed: int) -> tuple[Demand, torch.Tensor, Placement]:
    ranks, rng = hierarchy.num_ranks, np.random.default_rng(seed)
    pairs_GE, home = random_pairs(ranks, ranks * per_rank, 200, seed), random_home(ranks, per_rank, seed)
    load_E, experts = pairs_GE.sum(0).numpy(), ranks * per_rank
    demand = Demand(
        load_E,
        home.rank_of(ranks).numpy(),
        tuple(rng.integers(0, 9999, groups) / 4 for groups in hierarchy.groups),
        tuple(rng.integers(0, 9, experts) / 8 for _ in hierarchy.groups),  # such sums are exact
        tuple(rng.integers(0, 9, (groups, experts)) / 8 for groups in hierarchy.groups),
    )
    return demand, pairs_GE, home


def busy_ms(demand: Demand, copies: list[Copy], hierarchy: Hierarchy, level_ms: list[float]) -> float:
    """Of the busiest link."""
    most = 0.0
    for level, ms in enumerate(level_ms, start=1):
        lanes = hierarchy.lanes(level)
        ends = [(int(demand.home_E[copy.expert]) // lanes, copy.rank // lanes) for copy in copies]
        crossing = [(out, into) for out, into in ends if out != into]
        for end in range(2):
            most = max([most, *(n * ms for n in Counter(pair[end] for pair in crossing).values())])
    return most


def reference(demand: Demand, hierarchy: Hierarchy, level_ms: list[float], spare: int) -> list[Copy]:
    """After every copy everything is counted anew from the list of copies."""
    ranks, depth, apart = hierarchy.num_ranks, hierarchy.depth, separating_level(hierarchy).tolist()
    home, experts = demand.home_E.tolist(), range(len(demand.home_E))
    mean = -(-int(demand.load_E.sum()) // ranks)
    copies: list[Copy] = []

    def left(expert: int) -> int:
        return int(demand.load_E[expert]) - sum(copy.tokens for copy in copies if copy.expert == expert)

    def load(rank: int) -> int:
        own = sum(left(expert) for expert in experts if home[expert] == rank)
        return own + sum(copy.tokens for copy in copies if copy.rank == rank)

    lanes_of = [hierarchy.lanes(level) for level in range(1, depth + 1)]
    budgets = sorted({n * ms for ms, gpus in zip(level_ms, lanes_of, strict=True) for n in range(1, spare * gpus + 1)})
    for budget in budgets:
        while True:
            giver = max(range(ranks), key=lambda rank: (load(rank), -rank))
            need, found = load(giver) - mean, None
            for expert in sorted((e for e in experts if home[e] == giver), key=lambda e: (-left(e), e)):
                options = []
                for rank in range(ranks):
                    there = [copy for copy in copies if copy.rank == rank]
                    one = Copy(expert, rank, min(need, mean - load(rank), left(expert)))
                    if len(there) == spare or rank == giver or any(copy.expert == expert for copy in there):
                        continue
                    if one.tokens > 0 and busy_ms(demand, [*copies, one], hierarchy, level_ms) <= budget * (1 + 1e-9):
                        options.append((one.tokens, apart[giver][rank], -rank, one))
                if options:
                    found = max(options)[-1]
                    break
            if need <= 0 or found is None:
                break
            copies.append(found)
    return copies


def rows_after(demand: Demand, copies: list[Copy], hierarchy: Hierarchy, level: int) -> float:
    """Of the busiest group."""
    lanes, rows = hierarchy.lanes(level), demand.rows[level - 1].tolist()
    for copy in copies:
        out, into = int(demand.home_E[copy.expert]) // lanes, copy.rank // lanes
        if out != into:
            rows[out] -= copy.tokens * float(demand.leaving[level - 1][copy.expert])
            rows[into] += copy.tokens * float(demand.coming[level - 1][into, copy.expert])
    return max(rows)


@given(
    hierarchy=hierarchies(depths=(1, 3), most_ranks=8), per_rank=st.integers(1, 3), spare=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)  # fmt: skip
@examples(40)
def test_copies_and_their_prefixes_equal_the_reference(
    hierarchy: Hierarchy, per_rank: int, spare: int, seed: int
) -> None:
    demand, _, _ = random_demand(hierarchy, per_rank, seed)
    level_ms = (np.random.default_rng(seed).integers(1, 5, hierarchy.depth) / 2).tolist()
    copies, after = copies_in_order(demand, hierarchy, level_ms, spare)
    assert copies == reference(demand, hierarchy, level_ms, spare)
    home = demand.home_E.tolist()
    for n in range(len(copies) + 1):
        load = [0] * hierarchy.num_ranks
        for expert, tokens in enumerate(demand.load_E.tolist()):
            load[home[expert]] += tokens
        for copy in copies[:n]:
            load[home[copy.expert]] -= copy.tokens
            load[copy.rank] += copy.tokens
        assert after.load_n[n] == max(load)
        assert after.link_ms_n[n] == busy_ms(demand, copies[:n], hierarchy, level_ms)
        for level in range(1, hierarchy.depth + 1):
            assert after.rows_Dn[level - 1, n] == rows_after(demand, copies[:n], hierarchy, level)


@given(hierarchy=hierarchies(depths=(1, 3), most_ranks=8), seed=st.integers(0, 10**6))
@examples(25)
def test_the_plan_is_the_shortest_prefix_with_the_smallest_time(hierarchy: Hierarchy, seed: int) -> None:
    demand, _, _ = random_demand(hierarchy, 2, seed)
    level_ms, weights = [1.0] * hierarchy.depth, np.random.default_rng(seed).integers(0, 3, hierarchy.depth)

    def step_ms(after: Prefixes) -> np.ndarray:
        return weights @ after.rows_Dn / 64 + after.link_ms_n + after.load_n / 64

    every, after = copies_in_order(demand, hierarchy, level_ms, 2)
    times = step_ms(after).tolist()
    plan = priced_copies(demand, hierarchy, level_ms, 2, step_ms)
    assert plan == every[: times.index(min(times))]
    assert priced_copies(demand, hierarchy, level_ms, 2, lambda after: after.link_ms_n) == []  # nothing that they save


@given(hierarchy=hierarchies(depths=(1, 3), most_ranks=8), per_rank=st.integers(1, 3), seed=st.integers(0, 10**6))
@examples(40)
def test_copies_take_their_tokens_from_the_nearest_sources(hierarchy: Hierarchy, per_rank: int, seed: int) -> None:
    ranks, apart = hierarchy.num_ranks, separating_level(hierarchy).tolist()
    demand, pairs_GE, home = random_demand(hierarchy, per_rank, seed)
    copies, _ = copies_in_order(demand, hierarchy, [1.0] * hierarchy.depth, 2)
    asked = {(s, e): int(pairs_GE[s, e]) for s, e in product(range(ranks), range(ranks * per_rank))}
    wanted: Counter[tuple[int, int, int]] = Counter()
    for copy in copies:
        needs = copy.tokens
        for source in sorted(range(ranks), key=lambda s: (-apart[copy.rank][s], s)):
            tokens = min(needs, asked[source, copy.expert])
            wanted[source, copy.expert, copy.rank] += tokens
            asked[source, copy.expert] -= tokens
            needs -= tokens
        assert not needs
    for (source, expert), tokens in asked.items():
        wanted[source, expert, int(demand.home_E[expert])] += tokens
    placement = with_copies(pairs_GE, home, copies, 2, hierarchy)
    assert shares(placement, pairs_GE, home) == {key: tokens for key, tokens in wanted.items() if tokens}
    own = placement.expert_at_S.view(ranks, -1)[:, :per_rank]
    assert torch.equal(own.reshape(-1), home.expert_at_S) and placement.num_slots == ranks * (per_rank + 2)


def test_copies_stay_inside_a_node_while_that_is_cheaper() -> None:
    hierarchy = Hierarchy((2, 4), ("node", "gpu"))
    load_E = np.array([90, 10, 60, 40])  # one expert a GPU
    rows, alone = tuple(np.zeros(n) for n in (2, 4)), tuple(np.ones(4) for _ in range(2))
    demand = Demand(load_E, np.arange(4), rows, alone, tuple(np.ones((n, 4)) for n in (2, 4)))
    copies, after = copies_in_order(demand, hierarchy, [10.0, 1.0], 1)
    assert copies == [Copy(0, 1, 40), Copy(2, 3, 10)] and after.load_n.tolist() == [90, 60, 50]
    assert after.link_ms_n.tolist() == [0, 1, 1]
    across = Demand(np.array([90, 70, 20, 20]), np.arange(4), rows, alone, demand.coming)
    copies, after = copies_in_order(across, hierarchy, [10.0, 1.0], 1)
    assert copies == [Copy(0, 2, 30), Copy(1, 3, 20)] and after.link_ms_n.tolist() == [0, 10, 20]


def test_nothing_to_copy_where_all_are_even() -> None:
    hierarchy, nothing = Hierarchy((2, 4)), tuple(np.zeros(n) for n in (2, 4))
    alone, coming = tuple(np.ones(4) for _ in range(2)), tuple(np.ones((n, 4)) for n in (2, 4))
    for load in (7, 0):
        demand = Demand(np.full(4, load), np.arange(4), nothing, alone, coming)
        assert copies_in_order(demand, hierarchy, [1.0, 1.0], 2)[0] == []
