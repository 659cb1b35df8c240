"""PlaceMoE's layouts, mappings and replay against plain loops over tokens."""

from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from baselines.guests import domain_level
from baselines.placemoe import Demand, PlaceMoEPolicy, TwoFixedCopiesPolicy, Weights, by_demand, mapped, replayed_ms
from hiermoe.model import RowBytes
from hiermoe.planner.cost import time_by_groups
from hiermoe.planner.scheme import hierarchical
from hiermoe.planner.token_sets import TokenSets
from hiermoe.policies.protocol import CopyTerms, StepContext
from hiermoe.routing.step import RoutingStep
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.baselines.counted import random_home
from tests.planner.cases import examples, hierarchies, random_cluster, random_copies, random_step

Token = tuple[int, tuple[int, ...]]  # source, experts

CELLS = 4096  # so many that few of a test's tokens collide


def context_of(hierarchy: Hierarchy, iteration: int = 0) -> StepContext:
    dimension = min(2, hierarchy.depth)
    return StepContext(
        iteration, random_cluster(hierarchy, 0), hierarchical(dimension, True, hierarchy), RowBytes.alike(4096), 10**6
    )


def some_step(hierarchy: Hierarchy, experts: int, seed: int, tokens: int = 8) -> RoutingStep:
    generator = torch.Generator().manual_seed(seed)
    return random_step([tokens] * hierarchy.num_ranks, experts, min(3, experts), generator, skew=1.5)


def captured(steps: list[RoutingStep], experts: int) -> TokenSets:
    """All tokens, as a sketch without collisions gives them."""
    ids = [torch.cat([step.expert_ids_NK, step.source_N[:, None] + experts], 1) for step in steps]
    number = torch.cat([torch.full((len(part),), i) for i, part in enumerate(ids)])
    return TokenSets.of(torch.cat(ids), experts + steps[0].num_ranks, number)


def tokens_of(steps: list[RoutingStep]) -> list[Token]:
    return [
        (source, tuple(experts))
        for step in steps
        for source, experts in zip(step.source_N.tolist(), step.expert_ids_NK.tolist(), strict=True)
    ]


def reference_map(
    layout: list[int], tokens: list[Token], hierarchy: Hierarchy, experts: int, weights: Weights, sweeps: int
) -> list[list[int]]:
    ranks, lanes = hierarchy.num_ranks, hierarchy.lanes(domain_level(hierarchy))
    asked = Counter((source, expert) for source, chosen in tokens for expert in chosen)
    everyone = sorted(((s, e) for s in range(ranks) for e in range(experts)), key=lambda job: (-asked[job], job))
    rank = [slot * ranks // len(layout) for slot in range(len(layout))]
    uses: dict[tuple[int, int], int] = {}

    def load(of: int, without: tuple[int, int] | None = None) -> int:
        return sum(asked[job] for job, slot in uses.items() if rank[slot] == of and job != without)

    for job in everyone:
        slots = [slot for slot, expert in enumerate(layout) if expert == job[1]]
        near = [slot for slot in slots if rank[slot] // lanes == job[0] // lanes]
        uses[job] = min(near or slots, key=lambda slot: (load(rank[slot]), slot))
    for _ in range(sweeps):
        for job in everyone:
            slots = [slot for slot, expert in enumerate(layout) if expert == job[1]]
            if len(slots) == 1 or not asked[job]:
                continue

            def score(slot: int, job: tuple[int, int] = job) -> float:
                others = [
                    rank[uses[job[0], other]]
                    for source, chosen in tokens
                    if source == job[0] and job[1] in chosen
                    for other in chosen
                    if other != job[1]
                ]
                in_node = sum(at // lanes == rank[slot] // lanes for at in others)
                on_rank = sum(at == rank[slot] for at in others)
                loads = [load(of, job) + (asked[job] if of == rank[slot] else 0) for of in range(ranks)]
                return weights.node * in_node + weights.rank * on_rank - weights.load * max(loads)

            best = max(score(slot) for slot in slots)
            uses[job] = next(slot for slot in slots if score(slot) == best)
    return [[uses[source, expert] for expert in range(experts)] for source in range(ranks)]


@given(
    hierarchy=hierarchies(depths=(1, 3), most_ranks=8), spare=st.integers(0, 2), sweeps=st.integers(0, 2),
    load_weight=st.sampled_from([0.0, 0.5, 4.0]), seed=st.integers(0, 10**6),
)  # fmt: skip
@examples(25)
def test_mapping_equals_the_reference(
    hierarchy: Hierarchy, spare: int, sweeps: int, load_weight: float, seed: int
) -> None:
    ranks, experts = hierarchy.num_ranks, 2 * hierarchy.num_ranks
    steps = [some_step(hierarchy, experts, seed, tokens=4)]
    layout = random_copies(experts, (2 + spare) * ranks, ranks, torch.Generator().manual_seed(seed)).expert_at_S
    weights, demand = Weights(1.0, 0.25, load_weight), Demand.of(captured(steps, experts), experts, ranks)
    wanted = reference_map(layout.tolist(), tokens_of(steps), hierarchy, experts, weights, sweeps)
    assert mapped(layout, demand, hierarchy, weights, sweeps).tolist() == wanted


@given(hierarchy=hierarchies(depths=(1, 3), most_ranks=8), seed=st.integers(0, 10**6))
@examples(20)
def test_replay_prices_every_step_as_a_count_of_its_tokens_does(hierarchy: Hierarchy, seed: int) -> None:
    ranks, experts = hierarchy.num_ranks, 2 * hierarchy.num_ranks
    steps = [some_step(hierarchy, experts, seed + i) for i in range(3)]
    placement = random_copies(experts, 3 * ranks, ranks, torch.Generator().manual_seed(seed))
    assert placement.copy_GE is not None
    where, total = context_of(hierarchy), 0.0
    for step in steps:
        needs: dict[tuple[int, int], int] = defaultdict(int)  # level, group -> tokens
        rows = [0] * ranks
        for source, chosen in tokens_of([step]):
            at = [int(placement.copy_GE[source, expert]) * ranks // placement.num_slots for expert in chosen]
            for rank in at:
                rows[rank] += 1
            for level in range(1, hierarchy.depth + 1):
                for group in {rank // hierarchy.lanes(level) for rank in at}:
                    needs[level, group] += 1

        def busiest(level: int, needs: dict[tuple[int, int], int] = needs) -> int:
            return max(tokens for (at, _), tokens in needs.items() if at == level)

        comm_ms = time_by_groups(where.scheme, busiest, where.cluster, where.row_bytes)
        total += 4 * float(comm_ms) + 3 * max(rows) * 2 * 10**6 / 50e9
    found = replayed_ms(captured(steps, experts), placement, where, tflops=50.0)
    assert found == pytest.approx(total / 3)


@given(
    hierarchy=hierarchies(depths=(1, 3), most_ranks=12), per_rank=st.integers(1, 3), spare=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)  # fmt: skip
@examples(40)
def test_slots_hold_what_their_node_asks_for_most(hierarchy: Hierarchy, per_rank: int, spare: int, seed: int) -> None:
    ranks, home = hierarchy.num_ranks, random_home(hierarchy.num_ranks, per_rank, seed)
    experts, lanes = ranks * per_rank, hierarchy.lanes(domain_level(hierarchy))
    tokens_GE = torch.randint(0, 20, (ranks, experts), generator=torch.Generator().manual_seed(seed)).numpy()
    layout = by_demand(tokens_GE, home, ranks * (per_rank + spare), hierarchy).view(ranks, -1)
    assert torch.equal(layout[:, :per_rank].reshape(-1), home.expert_at_S)
    for first in range(0, ranks, lanes):
        here = home.expert_at_S.view(ranks, -1)[first : first + lanes].unique().tolist()
        asked = tokens_GE[first : first + lanes].sum(0)
        away = sorted(set(range(experts)) - set(here), key=lambda e: (-asked[e], e))[: lanes * spare]
        came = layout[first : first + lanes, per_rank:]
        fillers = layout[first : first + lanes, :1].expand_as(came)
        assert sorted(came[came != fillers].tolist()) == sorted(away)


def walked(policy: PlaceMoEPolicy, hierarchy: Hierarchy, steps: list[RoutingStep]) -> list[tuple[bytes, bool]]:
    """The placement after every step, and whether the slots changed."""
    placement, seen = Placement.identity(steps[0].num_experts), []
    for iteration, step in enumerate(steps):
        summed = policy.measure(step.expert_ids_NK, step.source_N, placement, hierarchy, iteration)
        update = policy.decide(summed, placement, context_of(hierarchy, iteration))
        before = placement.expert_at_S
        placement = placement if update is None else update.placement
        seen.append((placement.key, not torch.equal(before, placement.expert_at_S)))
    return seen


def test_lays_out_and_maps_at_intervals_of_their_own_and_goes_on_from_its_state() -> None:
    hierarchy = Hierarchy((2, 8), ("node", "gpu"))
    steps = [some_step(hierarchy, 16, seed, tokens=64) for seed in range(12)]

    def policy() -> PlaceMoEPolicy:
        return PlaceMoEPolicy(spare=1, layout_interval=6, mapping_interval=2, window=1, cells=CELLS)

    seen = walked(policy(), hierarchy, steps)
    changed = [i for i in range(1, 12) if seen[i][0] != seen[i - 1][0]]
    assert seen[4][0] == Placement.identity(16).key and seen[5][1] and {i % 2 for i in changed} == {1}
    assert [i for i in range(12) if seen[i][1]] in ([5], [5, 11]) and {7, 9} & set(changed)
    one, other = policy(), policy()
    for step in steps[:5]:
        summed = one.measure(step.expert_ids_NK, step.source_N, Placement.identity(16), hierarchy, 0)
        one.decide(summed, Placement.identity(16), context_of(hierarchy))
    other.load_state_dict(one.state_dict())
    home = Placement.identity(16)
    summed = one.measure(steps[5].expert_ids_NK, steps[5].source_N, home, hierarchy, 5)
    updates = [each.decide(summed, home, context_of(hierarchy, 5)) for each in (one, other)]
    assert updates[0] is not None and updates[1] is not None
    assert updates[0].placement.key == updates[1].placement.key == seen[5][0]
    with pytest.raises(ValueError, match="PlaceMoEPolicy remembers"):
        other.load_state_dict({"sum_E": torch.zeros(1)})


def test_a_plan_is_no_worse_on_the_routes_that_it_was_made_from() -> None:
    hierarchy = Hierarchy((2, 8), ("node", "gpu"))
    step, policy = some_step(hierarchy, 16, 0, tokens=64), PlaceMoEPolicy(spare=1, layout_interval=1, cells=CELLS)
    home, where = Placement.identity(16), context_of(hierarchy)
    summed = policy.measure(step.expert_ids_NK, step.source_N, home, hierarchy, 0)
    update = policy.decide(summed, home, where)
    routes = captured([step], 16)
    assert update is not None
    assert replayed_ms(routes, update.placement, where, 100.0) < replayed_ms(routes, home, where, 100.0)


def test_sketched_routes_are_the_tokens_with_their_sources() -> None:
    hierarchy = Hierarchy((2, 4))
    step, policy = some_step(hierarchy, 8, 3, tokens=5), PlaceMoEPolicy(cells=CELLS)
    summed = policy.measure(step.expert_ids_NK, step.source_N, Placement.identity(8), hierarchy, 0)
    policy.decide(summed, Placement.identity(8), context_of(hierarchy))
    found: Counter[Token] = Counter()
    state = policy.state_dict()
    for row, weight in zip(state["ids_NK"].tolist(), state["weight_N"].tolist(), strict=True):
        found[row[-1] - 8, tuple(row[:-1])] += weight
    assert found == Counter((source, tuple(sorted(chosen))) for source, chosen in tokens_of([step]))


def test_without_a_plan_every_expert_is_in_two_halves_of_the_cluster() -> None:
    hierarchy, home = Hierarchy((2, 4), ("node", "gpu")), random_home(4, 2, 0)
    update = TwoFixedCopiesPolicy().decide(None, home, context_of(hierarchy))
    assert update is not None and update.placement.num_slots == 16
    layout: Tensor = update.placement.expert_at_S.view(2, -1)
    assert all(sorted(half.tolist()) == list(range(8)) for half in layout)
    ids_NK = torch.arange(8).repeat(4, 1)
    rank_NK = update.placement.slots_of(ids_NK, torch.arange(4)) // 4
    assert rank_NK.div(2, rounding_mode="floor").tolist() == [[0] * 8] * 2 + [[1] * 8] * 2  # each its own node's copy
    assert TwoFixedCopiesPolicy().decide(None, update.placement, context_of(hierarchy, 1)) is None


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"layout_interval": 0}, {"window": 0}, {"sweeps": -1}):
        with pytest.raises(ValueError, match=r"layout_interval=\d+, .* sweeps=-?\d+ at least 0"):
            PlaceMoEPolicy(**wrong)  # type: ignore[arg-type]
    for wrong in ({"load_weight": -1.0}, {"tflops": 0.0}):
        with pytest.raises(ValueError, match=r"load_weight=\S+ must be at least 0, and tflops=\S+ positive"):
            PlaceMoEPolicy(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shared_buffers=True and with_state=True"):
        CopyTerms(shared_buffers=True, gradient_bytes=2, with_state=True)
