"""No placement goes below the bound."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiermoe.model import RowBytes
from hiermoe.planner.bounds import MateBound, any_placement_rows, least_traffic
from hiermoe.planner.cost import choose_scheme
from hiermoe.planner.counts import count_routing
from hiermoe.planner.scheme import every_dimension, hierarchical
from hiermoe.planner.token_sets import TokenSets
from hiermoe.routing.step import RoutingStep
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.planner.cases import examples, random_cluster, random_step
from tests.policies.search.conftest import every_placement, planted

TINY = [
    (Hierarchy((2, 4)), 4), (Hierarchy((2, 4)), 8), (Hierarchy((2,)), 8), (Hierarchy((3,)), 6), (Hierarchy((1, 3)), 6),
]  # fmt: skip


@pytest.mark.slow
@examples(24)
@given(
    world=st.sampled_from(TINY), topk=st.integers(1, 4), skew=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_no_placement_has_fewer_rows_or_less_time(
    world: tuple[Hierarchy, int], topk: int, skew: float, seed: int
) -> None:
    hierarchy, experts = world
    step = random_step([6] * hierarchy.num_ranks, experts, topk, torch.Generator().manual_seed(seed), skew)
    cluster, schemes = random_cluster(hierarchy, seed), every_dimension(hierarchy)
    sets = TokenSets.of(step.expert_ids_NK, experts).merged()
    bounds = [MateBound(experts, hierarchy, level) for level in range(1, hierarchy.depth + 1)]
    least = least_traffic(sets, bounds, schemes, cluster, RowBytes.alike(4096))
    again = least_traffic(sets, bounds, schemes, cluster, RowBytes.alike(4096))  # from the points of the first call
    fewest, fastest_ms = [10**9] * hierarchy.depth, float("inf")
    for placement in every_placement(experts, hierarchy):
        counts = count_routing(step, placement, hierarchy)
        fewest = [min(known, int(counts.tokens[level].sum())) for level, known in enumerate(fewest)]
        fastest_ms = min(fastest_ms, choose_scheme(schemes, counts, cluster, RowBytes.alike(4096)).alltoall_ms)
    for found in (least, again):
        assert all(bound <= rows for bound, rows in zip(found.rows, fewest, strict=True))
        assert found.alltoall_ms <= fastest_ms * (1 + 1e-12)
        assert found.alltoall_ms > 0.3 * fastest_ms  # and says something


def test_bound_is_reached_where_a_tokens_experts_can_always_sit_together() -> None:
    hierarchy = Hierarchy((4, 8))
    ids_NK, hidden_E = planted(32, 4, 8, 500, seed=1)
    sets = TokenSets.of(ids_NK, 32)
    bound = MateBound(32, hierarchy, 1)
    assert [bound.rows(sets) for _ in range(30)][-1] == 500
    placement = Placement.of_slots(torch.argsort(torch.argsort(hidden_E, stable=True)))
    step = RoutingStep(ids_NK, torch.arange(500) % 8, 8, 32)
    assert int(count_routing(step, placement, hierarchy).tokens[0].sum()) == 500


def test_bound_is_closer_than_the_one_that_knows_no_routing(a6000: Cluster) -> None:
    step = random_step([64] * 32, 128, 8, torch.Generator().manual_seed(3))
    sets = TokenSets.of(step.expert_ids_NK, 128).merged()
    counts = count_routing(step, Placement.identity(128), a6000.hierarchy)
    for level in range(1, 5):
        bound = MateBound(128, a6000.hierarchy, level).rows(sets)
        loose = any_placement_rows(2048, 8, 128, a6000.hierarchy, level)
        assert 1.2 * loose < bound <= int(counts.tokens[level - 1].sum())


def test_the_hottest_expert_bounds_the_time_too() -> None:
    """All tokens select expert 0: whoever has it gets them all."""
    hierarchy = Hierarchy((4,))
    cluster, scheme = random_cluster(hierarchy, 0), hierarchical(1, True, hierarchy)
    sets = TokenSets.of(torch.tensor([[0, 1 + n % 7] for n in range(70)]), 8)
    found = least_traffic(sets, [MateBound(8, hierarchy, 1)], (scheme,), cluster, RowBytes.alike(100))
    constants = cluster.world
    assert constants is not None
    assert found.alltoall_ms == pytest.approx(constants.alpha_ms + constants.beta_ms_per_byte * 100 * 70)


def test_merged_sets_have_the_same_bound() -> None:
    step = random_step([50] * 4, 8, 3, torch.Generator().manual_seed(4), skew=2.0)
    sets = TokenSets.of(step.expert_ids_NK, 8)
    hierarchy = Hierarchy((2, 4))
    assert MateBound(8, hierarchy, 1).rows(sets) == MateBound(8, hierarchy, 1).rows(sets.merged())


def test_schemes_that_send_pairs_have_no_such_bound() -> None:
    hierarchy = Hierarchy((2, 4))
    sets = TokenSets.of(torch.tensor([[0, 1]]), 8)
    bounds = [MateBound(8, hierarchy, level) for level in (1, 2)]
    with pytest.raises(ValueError, match="scheme H2 sends token-expert pairs"):
        least_traffic(
            sets, bounds, (hierarchical(2, False, hierarchy),), random_cluster(hierarchy, 0), RowBytes.alike(4096)
        )
