"""HierMoE with copies: its swaps against a recount of every one, and what it learns of tokens against the tokens."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiermoe.model import RowBytes
from hiermoe.planner.counts import count_routing
from hiermoe.planner.maxima import MaxFunction
from hiermoe.planner.scheme import hierarchical
from hiermoe.policies.copies import PricedCopiesPolicy, demand_of, shares_of
from hiermoe.policies.hierd_es import HierDESPolicy
from hiermoe.policies.price_of_moving import STATE_BYTES_PER_PARAMETER, price_migration
from hiermoe.policies.protocol import PlacementUpdate, StepContext
from hiermoe.policies.swap import SwapStatistics, measure_swaps, time_of_groups
from hiermoe.routing.step import RoutingStep
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.baselines.counted import random_home, shares
from tests.planner.cases import Case, cases, examples, random_cluster, random_step


def context_of(hierarchy: Hierarchy, iteration: int = 0, parameters: int = 10**6) -> StepContext:
    cluster, scheme = random_cluster(hierarchy, 1), hierarchical(min(2, hierarchy.depth), True, hierarchy)
    return StepContext(iteration, cluster, scheme, RowBytes.alike(4096), parameters)


def decided(
    policy: PricedCopiesPolicy, step: RoutingStep, placement: Placement, context: StepContext
) -> PlacementUpdate | None:
    """One iteration."""
    policy.rebalance(step.pairs_GE, placement, context)
    hierarchy = context.cluster.hierarchy
    summed = policy.measure(step.expert_ids_NK, step.source_N, placement, hierarchy, context.iteration)
    return policy.decide(summed, placement, context)


def decided_twice(
    policy: PricedCopiesPolicy, step: RoutingStep, placement: Placement, context: StepContext
) -> PlacementUpdate | None:
    """Two iterations of the same routing: nothing is swapped in the first."""
    assert decided(policy, step, placement, context) is None
    return decided(policy, step, placement, context)


def modelled_ms(policy: PricedCopiesPolicy, step: RoutingStep, placement: Placement, context: StepContext) -> float:
    """Q and the busiest GPU's computation, both smooth, from a recount."""
    counts = count_routing(step, placement, context.cluster.hierarchy)
    needed = [counts.needed(level) for level in range(1, context.cluster.hierarchy.depth + 1)]
    priced = context.scheme, context.cluster, context.row_bytes, policy.max_function
    rows = float(policy.max_function(counts.pairs_GG.sum(0).double()))
    return 4 * time_of_groups(needed, *priced) + rows * 6 * context.expert_parameters / (policy.tflops * 1e9)


@given(case=cases(most_ranks=8, most_per_rank=2), tflops=st.sampled_from([0.01, 1.0, 1e6]))
@examples(30)
def test_swap_is_the_best_of_all_by_alltoalls_and_computation(case: Case, tflops: float) -> None:
    policy, context = PricedCopiesPolicy(horizon=10**12, tflops=tflops), context_of(case.hierarchy)
    ranks, slots = case.hierarchy.num_ranks, case.placement.num_slots
    now_ms = modelled_ms(policy, case.step, case.placement, context)
    after_ms = {}
    for a in range(slots):
        for b in range(a + 1, slots):
            if a * ranks // slots != b * ranks // slots:
                experts = case.placement.expert_at_S[[a, b]].tolist()
                after_ms[a, b] = modelled_ms(policy, case.step, case.placement.swapped(*experts), context)
    policy.rebalance(case.step.pairs_GE, case.placement, context)
    stats = SwapStatistics.unpack(
        measure_swaps(case.step.expert_ids_NK, case.placement, case.hierarchy), slots, case.hierarchy
    )
    load_S = case.step.pairs_GE.sum(0)[case.placement.expert_at_S]
    times = policy._times(stats, load_S, context)
    assert times.now_ms == pytest.approx(now_ms)
    found = dict(zip(map(tuple, times.slots_2P.T.tolist()), times.after_ms_P.tolist(), strict=True))
    assert found == pytest.approx(after_ms)


def test_swaps_pay_within_the_horizon_and_only_then() -> None:
    hierarchy, home = Hierarchy((2, 8), ("node", "gpu")), Placement.identity(16)
    step = random_step([64] * 8, 16, 3, torch.Generator().manual_seed(0), skew=1.5)
    context = context_of(hierarchy, parameters=10**8)
    update = decided_twice(PricedCopiesPolicy(horizon=10**9), step, home, context)
    assert update is not None and update.modelled_gain_ms is not None
    assert len(home.changed_slots(update.placement)) == 2

    def plain_ms(placement: Placement) -> float:
        counts = count_routing(step, placement, hierarchy)
        needed = [counts.needed(level) for level in (1, 2)]
        return 4 * time_of_groups(needed, context.scheme, context.cluster, context.row_bytes, MaxFunction("plain"))

    assert update.modelled_gain_ms == pytest.approx(plain_ms(home) - plain_ms(update.placement))
    state_bytes = STATE_BYTES_PER_PARAMETER * context.expert_parameters
    link_ms = price_migration(home, update.placement, context.cluster, state_bytes).link_ms
    before, after = (modelled_ms(PricedCopiesPolicy(), step, one, context) for one in (home, update.placement))
    pays_after = link_ms / (before - after)
    assert pays_after > 1
    for horizon in (int(pays_after), int(pays_after) + 1):
        update = decided_twice(PricedCopiesPolicy(horizon=horizon), step, home, context)
        assert (update is not None) == (horizon > pays_after)
    several = decided_twice(PricedCopiesPolicy(horizon=10**9, max_swaps=4), step, home, context)
    assert several is not None and len(home.changed_slots(several.placement)) > 2


def test_a_swap_that_does_not_pay_on_the_next_step_is_not_made() -> None:
    hierarchy, home = Hierarchy((2, 8), ("node", "gpu")), Placement.identity(16)
    policy, context = PricedCopiesPolicy(horizon=10**9), context_of(hierarchy)
    step = random_step([64] * 8, 16, 3, torch.Generator().manual_seed(0), skew=1.5)
    assert decided(policy, step, home, context) is None
    (pair,) = policy.state_dict()["chosen"].tolist()
    swapped = home.swapped(*home.expert_at_S[pair].tolist())
    gains = set()
    for seed in range(1, 9):
        other = random_step([64] * 8, 16, 3, torch.Generator().manual_seed(seed), skew=1.5)
        again = PricedCopiesPolicy(horizon=10**9)
        again.load_state_dict(policy.state_dict())
        gain_ms = modelled_ms(again, other, home, context) - modelled_ms(again, other, swapped, context)
        update = decided(again, other, home, context)
        assert (update is not None) == (gain_ms > 0)
        assert update is None or update.placement.key == swapped.key
        gains.add(gain_ms > 0)
    assert gains == {False, True}


@given(case=cases(most_ranks=8))
@examples(25)
def test_what_is_learnt_of_tokens_are_shares_of_these_tokens(case: Case) -> None:
    hierarchy, placement = case.hierarchy, case.placement
    if not len(case.step.expert_ids_NK):
        return
    ranks, experts = hierarchy.num_ranks, placement.num_experts
    load_E, rank_E = case.step.pairs_GE.sum(0), placement.rank_of(ranks).tolist()
    stats = SwapStatistics.unpack(measure_swaps(case.step.expert_ids_NK, placement, hierarchy), experts, hierarchy)
    demand = demand_of(load_E, placement, shares_of(stats, load_E, placement), hierarchy)
    tokens = case.step.expert_ids_NK.tolist()
    for level in range(1, hierarchy.depth + 1):
        lanes = hierarchy.lanes(level)
        group = [rank // lanes for rank in rank_E]
        for u in range(hierarchy.U[level]):
            needed = sum(any(group[e] == u for e in chosen) for chosen in tokens)
            assert demand.rows[level - 1][u] == pytest.approx(needed)
        for expert in range(experts):
            mine = [chosen for chosen in tokens if expert in chosen]
            alone = sum(all(group[e] != group[expert] for e in chosen if e != expert) for chosen in mine)
            assert demand.leaving[level - 1][expert] == pytest.approx(alone / max(len(mine), 1))
            for u in range(hierarchy.U[level]):
                absent = sum(all(group[e] != u for e in chosen) for chosen in mine)
                assert demand.coming[level - 1][u, expert] == pytest.approx(absent / max(len(mine), 1))


def test_copies_appear_where_links_cost_little_and_not_where_they_cost_much() -> None:
    hierarchy, home = Hierarchy((2, 8), ("node", "gpu")), random_home(8, 2, 0)
    step = random_step([256] * 8, 16, 3, torch.Generator().manual_seed(0), skew=1.5)
    cheap = context_of(hierarchy)
    cheap = replace(cheap, cluster=cheap.cluster.model_copy(update={"levels": fast(cheap, 1e9)}))
    dear = replace(cheap, cluster=cheap.cluster.model_copy(update={"levels": fast(cheap, 1e-9)}))
    policy = PricedCopiesPolicy()
    placements = [policy.rebalance(step.pairs_GE, home, context) for context in (cheap, dear)]
    loads = [count_routing(step, placement, hierarchy).pairs_GG.sum(0) for placement in placements if placement]
    assert loads[0].max() < loads[1].max()
    assert torch.equal(loads[1], count_routing(step, home, hierarchy).pairs_GG.sum(0))
    found = shares(placements[0], step.pairs_GE, home)
    assert sum(found.values()) == int(step.pairs_GE.sum())


def fast(context: StepContext, gb_per_s: float) -> tuple:
    return tuple(level.model_copy(update={"link_gb_per_s": gb_per_s}) for level in context.cluster.levels)


def test_goes_on_from_its_state() -> None:
    hierarchy, placement = Hierarchy((2, 8), ("node", "gpu")), Placement.identity(16)
    one, other = PricedCopiesPolicy(horizon=10**9), PricedCopiesPolicy(horizon=10**9)
    for iteration in range(3):
        step = random_step([64] * 8, 16, 3, torch.Generator().manual_seed(iteration), skew=1.5)
        update = decided(one, step, placement, context_of(hierarchy, iteration))
        placement = placement if update is None else update.placement
    other.load_state_dict(one.state_dict())
    step, context = random_step([64] * 8, 16, 3, torch.Generator().manual_seed(9), skew=1.5), context_of(hierarchy, 3)
    copies = [policy.rebalance(step.pairs_GE, placement, context) for policy in (one, other)]
    assert copies[0] is not None and copies[1] is not None and copies[0].key == copies[1].key
    other.load_state_dict(one.state_dict())  # between two halves of an iteration
    summed = one.measure(step.expert_ids_NK, step.source_N, placement, hierarchy, 3)
    updates = [policy.decide(summed, placement, context) for policy in (one, other)]
    assert [update and update.placement.key for update in updates] == [updates[0] and updates[0].placement.key] * 2
    with pytest.raises(
        ValueError, match="PricedCopiesPolicy remembers chosen, load_E, rows, leaving, coming; the state has last"
    ):
        other.load_state_dict({"last": torch.zeros(1)})


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"spare": 0}, {"tflops": 0.0}):
        with pytest.raises(ValueError, match=r"spare=\d must be at least 1, and tflops=\S+ positive"):
            PricedCopiesPolicy(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="horizon=0"):
        PricedCopiesPolicy(horizon=0)


def test_what_is_said_to_be_measured_alike_is() -> None:
    hierarchy = Hierarchy((2, 4))
    step = random_step([10] * 4, 16, 3, torch.Generator().manual_seed(1))
    ours, theirs = PricedCopiesPolicy(interval=4), HierDESPolicy(interval=4)
    assert ours.measures_alike == theirs.measures_alike
    for iteration in range(8):
        of = step.expert_ids_NK, step.source_N, Placement.identity(16), hierarchy, iteration
        mine, other = ours.measure(*of), theirs.measure(*of)
        assert (mine is None) == (other is None) == (iteration % 4 != 3)
        assert mine is None or other is None or torch.equal(mine, other)
