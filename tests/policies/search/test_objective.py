"""What the search prices, against the slow reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiermoe.model import RowBytes
from hiermoe.planner.scheme import every_dimension, hierarchical
from hiermoe.planner.token_sets import TokenSets
from hiermoe.policies.search.objective import Objective, needed_by_step
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.placement import Placement
from tests.planner import reference
from tests.planner.cases import Case, cases, examples, random_cluster


@examples(40)
@given(case=cases(most_ranks=16, most_per_rank=2), seed=st.integers(0, 9))
def test_time_is_the_mean_over_steps_of_each_steps_cheapest_scheme(case: Case, seed: int) -> None:
    step, hierarchy = case.step, case.hierarchy
    if not len(step.source_N):
        return
    cluster = random_cluster(hierarchy, seed)
    of_N = (torch.arange(len(step.source_N)) * 3) % 2
    sets = TokenSets.of(step.expert_ids_NK, step.num_experts, of_N).merged()
    world, tokens = reference.machine(hierarchy, case.placement), reference.tokens_of(step)
    times = []
    for index in range(sets.num_steps):
        own = [token for token, of in zip(tokens, of_N.tolist(), strict=True) if of == index]
        counts = [reference.distinct_tokens(world, own, level) for level in range(1, hierarchy.depth + 1)]
        per_scheme = [
            reference.modelled_ms(counts, hierarchy.groups, cluster, 4096, d, "plain", 1.0)
            for d in range(1, hierarchy.depth + 1)
        ]
        times.append(4 * min(per_scheme))
    found = Objective(cluster, every_dimension(hierarchy), RowBytes.alike(4096)).step_ms(sets, case.placement)
    assert found == pytest.approx(sum(times) / len(times), rel=1e-9)


@examples(20)
@given(case=cases(most_ranks=12, most_per_rank=2))
def test_a_sample_is_scaled_to_its_step(case: Case) -> None:
    if not len(case.step.source_N):
        return
    sets = TokenSets.of(case.step.expert_ids_NK, case.step.num_experts)
    tripled = TokenSets(sets.ids_NK, sets.weight_N, sets.step_N, sets.tokens_S * 3, sets.num_experts)
    for whole, more in zip(
        needed_by_step(sets, case.placement, case.hierarchy),
        needed_by_step(tripled, case.placement, case.hierarchy),
        strict=True,
    ):
        assert torch.allclose(3 * whole, more)


def test_small_and_large_steps_may_take_different_schemes(a6000: Cluster) -> None:
    """Few tokens: each stage's alpha counts, so HD1. Many: bytes between nodes count."""
    ids_NK = torch.arange(64).view(2, 32)[:, :8].repeat(8, 1)
    sets = TokenSets.of(ids_NK, 64, torch.arange(16) // 8)
    uneven = TokenSets(sets.ids_NK, sets.weight_N, sets.step_N, torch.tensor([1, 100_000]), 64)
    objective = Objective(a6000, every_dimension(a6000.hierarchy), RowBytes.alike(4096))
    times = objective.scheme_ms(uneven, Placement.identity(64))
    small, large = times.argmin(0).tolist()
    assert small == 0 < large
    expected = 4 * (float(times[small, 0]) + float(times[large, 1])) / 2
    assert objective.step_ms(uneven, Placement.identity(64)) == pytest.approx(expected)


def test_schemes_that_send_pairs_are_refused(a6000: Cluster) -> None:
    with pytest.raises(ValueError, match="scheme H2 sends token-expert pairs"):
        Objective(a6000, (hierarchical(2, False, a6000.hierarchy),), RowBytes.alike(4096))
