"""Q, which takes senders as even, beside the price of the exact traffic, which does not."""

import math

import pytest
import torch

from hiermoe.model import RowBytes
from hiermoe.planner.cost import price
from hiermoe.planner.counts import count_routing
from hiermoe.planner.maxima import MaxFunction
from hiermoe.planner.scheme import every_dimension
from hiermoe.policies.swap import swap_times
from hiermoe.routing.step import RoutingStep, make_step
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.planner.cases import random_cluster, random_step, statistics


def same_tokens_everywhere(num_ranks: int, num_experts: int, seed: int) -> RoutingStep:
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(64, num_experts, generator=generator).topk(4, dim=-1).indices
    return make_step(ids_TK.expand(num_ranks, 64, 4), torch.full((num_ranks,), 64), num_experts)


@pytest.mark.parametrize("groups", [(2, 4, 8), (4, 8, 16, 32), (3, 6), (8,)])
def test_no_swap_time_is_the_price_where_senders_are_even(groups: tuple[int, ...]) -> None:
    hierarchy = Hierarchy(groups)
    num_experts = 2 * hierarchy.num_ranks
    step = same_tokens_everywhere(hierarchy.num_ranks, num_experts, 3)
    placement, cluster = Placement.identity(num_experts), random_cluster(hierarchy, 3)
    counts = count_routing(step, placement, hierarchy)
    stats = statistics(step.expert_ids_NK, placement, hierarchy)
    for scheme in every_dimension(hierarchy):
        times = swap_times(stats, scheme, cluster, RowBytes.alike(4096), MaxFunction("plain"))
        assert math.isclose(
            times.now_ms, price(scheme, counts, cluster, RowBytes.alike(4096)).alltoall_ms, rel_tol=1e-12
        )


def test_lanes_cost_little_on_uniform_routing(a6000: Cluster) -> None:
    """Reading 1: Q takes senders as even, the price does not. The difference on uniform routing, one sign only."""
    hierarchy = a6000.hierarchy
    generator = torch.Generator().manual_seed(1)
    step = random_step([1024] * 32, 128, 8, generator)
    placement = Placement.identity(128)
    counts, stats = (
        count_routing(step, placement, hierarchy),
        statistics(step.expert_ids_NK, placement, hierarchy),
    )
    gaps = {}
    for scheme in every_dimension(hierarchy):
        q = swap_times(stats, scheme, a6000, RowBytes.alike(4096), MaxFunction("plain")).now_ms
        gaps[scheme.name] = 1 - q / price(scheme, counts, a6000, RowBytes.alike(4096)).alltoall_ms
    assert abs(gaps["HD1"]) < 1e-12  # one lane a GPU: nothing to average
    assert all(-1e-12 <= gap < 0.02 for gap in gaps.values()), gaps
