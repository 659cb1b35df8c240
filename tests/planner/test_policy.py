"""HierD-ES as a policy: what it measures, when it acts, what it decides."""

import math

import pytest
import torch

from hiermoe.planner.migration import STATE_BYTES_PER_PARAMETER, price_migration
from hiermoe.planner.policy import HierDESPolicy, StaticPolicy, StepContext
from hiermoe.planner.scheme import hierarchical
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.placement import Placement
from tests.planner import reference
from tests.planner.cases import random_step

EXPERTS, ROW_BYTES = 64, 4096
STEP = random_step([32] * 32, EXPERTS, 4, torch.Generator().manual_seed(5), skew=1.0)
SHUFFLED = Placement(torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(6)))


def context(cluster: Cluster, iteration: int = 0, expert_parameters: int = 1) -> StepContext:
    return StepContext(iteration, cluster, hierarchical(3, True, cluster.hierarchy), ROW_BYTES, expert_parameters)


def recount(cluster: Cluster, placement: Placement, kind: str) -> float:
    hierarchy, tokens = cluster.hierarchy, reference.tokens_of(STEP)
    world = reference.machine(hierarchy, placement)
    counts = [reference.distinct_tokens(world, tokens, level) for level in range(1, hierarchy.depth + 1)]
    return reference.modelled_ms(counts, hierarchy.groups, cluster, ROW_BYTES, 3, kind, 10.0)


def test_static_policy_measures_and_moves_nothing(a6000: Cluster) -> None:
    policy = StaticPolicy()
    assert policy.measure(STEP.expert_ids_NK, SHUFFLED, a6000.hierarchy, 0) is None
    assert policy.decide(None, SHUFFLED, context(a6000)) is None


@pytest.mark.parametrize("kind", ["plain", "smooth", "logsumexp"])
def test_two_experts_change_places_and_the_gain_is_what_a_recount_finds(a6000: Cluster, kind: str) -> None:
    policy = HierDESPolicy(max_function=kind)
    update = policy.decide(policy.measure(STEP.expert_ids_NK, SHUFFLED, a6000.hierarchy, 0), SHUFFLED, context(a6000))
    assert update is not None and update.modelled_gain_ms is not None
    moved = (update.placement.slot_E != SHUFFLED.slot_E).nonzero().flatten().tolist()
    assert len(moved) == 2
    assert torch.equal(update.placement.slot_E, SHUFFLED.swapped(*moved).slot_E)
    assert recount(a6000, update.placement, kind) < recount(a6000, SHUFFLED, kind)
    gain_ms = 4 * (recount(a6000, SHUFFLED, "plain") - recount(a6000, update.placement, "plain"))
    assert math.isclose(update.modelled_gain_ms, gain_ms, rel_tol=1e-6, abs_tol=1e-12)


def test_ranks_that_sum_their_measures_decide_alike(a6000: Cluster) -> None:
    policy = HierDESPolicy()
    parts = [
        policy.measure(STEP.expert_ids_NK[STEP.source_N == rank], SHUFFLED, a6000.hierarchy, 0) for rank in range(32)
    ]
    summed = torch.stack([part for part in parts if part is not None]).sum(0)
    together = policy.decide(policy.measure(STEP.expert_ids_NK, SHUFFLED, a6000.hierarchy, 0), SHUFFLED, context(a6000))
    apart = policy.decide(summed, SHUFFLED, context(a6000))
    assert together is not None and apart is not None
    assert torch.equal(together.placement.slot_E, apart.placement.slot_E)
    assert together.modelled_gain_ms == apart.modelled_gain_ms


def test_only_the_last_iteration_of_an_interval_counts(a6000: Cluster) -> None:
    policy = HierDESPolicy(interval=4)
    acts = []
    for iteration in range(8):
        measure = policy.measure(STEP.expert_ids_NK, SHUFFLED, a6000.hierarchy, iteration)
        if policy.decide(measure, SHUFFLED, context(a6000, iteration)):
            acts.append(iteration)
    assert acts == [3, 7]


def test_gate_weighs_the_gain_against_the_move(a6000: Cluster) -> None:
    measure = HierDESPolicy().measure(STEP.expert_ids_NK, SHUFFLED, a6000.hierarchy, 0)
    update = HierDESPolicy().decide(measure, SHUFFLED, context(a6000))
    assert update is not None and update.modelled_gain_ms is not None
    cost_ms = price_migration(SHUFFLED, update.placement, a6000, STATE_BYTES_PER_PARAMETER).link_ms  # of one parameter
    breaks_even = update.modelled_gain_ms * 100 / cost_ms
    gated = HierDESPolicy(gated=True, horizon=100)
    cheap = gated.decide(measure, SHUFFLED, context(a6000, expert_parameters=int(breaks_even * 0.99)))
    assert cheap is not None and torch.equal(cheap.placement.slot_E, update.placement.slot_E)
    dear = context(a6000, expert_parameters=int(breaks_even * 1.01) + 1)
    assert gated.decide(measure, SHUFFLED, dear) is None
    assert HierDESPolicy(gated=True, horizon=200).decide(measure, SHUFFLED, dear) is not None
    assert HierDESPolicy().decide(measure, SHUFFLED, dear) is not None


def test_pairs_cannot_be_planned(a6000: Cluster) -> None:
    policy = HierDESPolicy()
    measure = policy.measure(STEP.expert_ids_NK, SHUFFLED, a6000.hierarchy, 0)
    flat = StepContext(0, a6000, hierarchical(1, False, a6000.hierarchy), ROW_BYTES, 1)
    with pytest.raises(ValueError, match="scheme H1 sends token-expert pairs"):
        policy.decide(measure, SHUFFLED, flat)


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"horizon": 0}, {"gamma": 0.0}, {"max_function": "mean"}])
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        HierDESPolicy(**wrong)
