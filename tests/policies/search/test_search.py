"""The whole search: optima that are known, limits, and what it promises."""

import pytest
import torch

from hiermoe.model import RowBytes
from hiermoe.planner.counts import count_routing
from hiermoe.planner.scheme import every_dimension, hierarchical
from hiermoe.planner.token_sets import TokenSets
from hiermoe.policies.search.objective import Objective
from hiermoe.policies.search.search import SearchResult, search_placement
from hiermoe.routing.step import RoutingStep
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.planner.cases import random_cluster, random_step
from tests.policies.search.conftest import every_placement, planted

TINY = Hierarchy((2, 4))


def searched(ids_NK: torch.Tensor, experts: int, cluster: Cluster, steps: int = 100, seed: int = 0) -> SearchResult:
    schemes = every_dimension(cluster.hierarchy)
    return search_placement(ids_NK, experts, cluster, 4096, schemes, budget_s=None, steps=steps, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_the_best_of_all_placements_is_found_where_all_can_be_tried(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids_NK = random_step([20] * 4, 8, 3, generator, skew=1.0).expert_ids_NK
    cluster = random_cluster(TINY, seed)
    objective = Objective(cluster, every_dimension(TINY), RowBytes.alike(4096))
    sets = TokenSets.of(ids_NK, 8)
    optimum = min(objective.step_ms(sets, placement) for placement in every_placement(8, TINY))
    result = searched(ids_NK, 8, cluster, seed=seed)
    assert result.modelled_ms == pytest.approx(optimum, rel=1e-9)
    assert objective.step_ms(sets, result.placement) == pytest.approx(optimum, rel=1e-9)


def test_planted_groups_are_found_and_no_token_crosses_them(a6000: Cluster) -> None:
    ids_NK, _ = planted(64, 4, 6, 4000, seed=2)
    result = searched(ids_NK, 64, a6000, steps=60)
    step = RoutingStep(ids_NK, torch.arange(4000) % 32, 32, 64)
    counts = count_routing(step, result.placement, a6000.hierarchy)
    assert int(counts.tokens[0].sum()) == 4000  # one node a token
    assert result.modelled_ms < 0.7 * result.start_ms


def test_same_seed_and_steps_give_the_same_and_progress_only_improves(a6000: Cluster) -> None:
    ids_NK = random_step([64] * 32, 64, 4, torch.Generator().manual_seed(4), skew=1.0).expert_ids_NK
    first, second = (searched(ids_NK, 64, a6000, steps=90) for _ in range(2))
    assert torch.equal(first.placement.slot_E, second.placement.slot_E)
    assert first.steps == second.steps == 90
    times = [entry.modelled_ms for entry in first.progress]
    assert times == sorted(times, reverse=True) and len(times) > 1
    assert (times[0], times[-1]) == (first.start_ms, first.modelled_ms)
    assert all(entry.steps <= 90 for entry in first.progress)


def test_more_steps_are_never_worse(a6000: Cluster) -> None:
    ids_NK = random_step([64] * 32, 64, 4, torch.Generator().manual_seed(5), skew=1.0).expert_ids_NK
    few, many = searched(ids_NK, 64, a6000, steps=5), searched(ids_NK, 64, a6000, steps=80)
    assert many.modelled_ms < few.modelled_ms < few.start_ms


def test_time_limit_ends_a_search_with_the_best_so_far(a6000: Cluster) -> None:
    ids_NK = random_step([64] * 32, 64, 4, torch.Generator().manual_seed(6), skew=1.0).expert_ids_NK
    result = search_placement(ids_NK, 64, a6000, 4096, every_dimension(a6000.hierarchy), budget_s=0.2)
    assert result.seconds >= 0.2 and result.modelled_ms < result.start_ms


def test_an_optimal_start_is_kept_to_the_slot(a6000: Cluster) -> None:
    ids_NK = torch.arange(64).view(32, 2).repeat(20, 1)  # the two experts of one GPU, all GPUs alike
    result = searched(ids_NK, 64, a6000, steps=30)
    assert result.placement.is_identity and result.modelled_ms == result.start_ms


def test_every_step_has_its_own_busiest_group() -> None:
    """Two experts are hot in turn: together on a node they are balanced over all steps and in none."""
    ids_NK = torch.tensor([[0, 1]] * 50 + [[2, 3]] * 50)
    step_N = torch.arange(2).repeat_interleave(50)
    cluster = random_cluster(TINY, 1)
    sets = TokenSets.of(ids_NK, 4, step_N)
    by_step = Objective(cluster, (hierarchical(2, True, TINY),), RowBytes.alike(4096)).step_ms(
        sets, Placement.identity(4)
    )
    pooled = Objective(cluster, (hierarchical(2, True, TINY),), RowBytes.alike(4096)).step_ms(
        sets.pooled(), Placement.identity(4)
    )
    assert by_step > pooled


def test_one_gpu_has_nothing_to_search() -> None:
    alone = Hierarchy((1,))
    result = searched(torch.tensor([[0, 1], [2, 3]]), 4, random_cluster(alone, 0))
    assert result.placement.is_identity


def test_experts_that_do_not_divide_over_gpus_are_refused(a6000: Cluster) -> None:
    with pytest.raises(ValueError, match="num_experts=40 is not divisible by ep_size=32"):
        searched(torch.tensor([[0, 39]]), 40, a6000)
