"""Statistics that follow the placement, and descents on them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiermoe.model import RowBytes
from hiermoe.planner.maxima import MaxFunction
from hiermoe.planner.scheme import hierarchical
from hiermoe.planner.token_sets import TokenSets
from hiermoe.policies.search.descent import Budget, SwapTable, descend
from hiermoe.policies.swap import measure_swaps
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.placement import Placement
from tests.planner.cases import Case, cases, examples, random_cluster, random_step

SMOOTH = MaxFunction("smooth", 10.0)


@examples(40)
@given(case=cases(most_ranks=12, most_per_rank=3), seed=st.integers(0, 99))
def test_after_any_swaps_statistics_are_those_counted_anew(case: Case, seed: int) -> None:
    if not len(case.step.source_N):
        return
    sets = TokenSets.of(case.step.expert_ids_NK, case.step.num_experts).merged()
    table = SwapTable(sets, case.placement, random_cluster(case.hierarchy, 0))
    generator = torch.Generator().manual_seed(seed)
    expected = case.placement
    for _ in range(4):
        r, c = torch.randperm(sets.num_experts, generator=generator)[:2].tolist()
        at = expected.expert_at_S
        expected = expected.swapped(int(at[r]), int(at[c]))
        table.swap(r, c)
    assert torch.equal(table.placement.slot_E, expected.slot_E)
    anew = SwapTable(TokenSets.of(case.step.expert_ids_NK, sets.num_experts), expected, table.cluster)
    for mine, other in zip(table.statistics.levels, anew.statistics.levels, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(vars(mine).values(), vars(other).values(), strict=True))


@examples(30)
@given(case=cases(most_ranks=12, most_per_rank=2))
def test_a_weighted_set_counts_as_so_many_tokens(case: Case) -> None:
    ids_NK = case.step.expert_ids_NK
    weight_N = torch.arange(len(ids_NK)).int() % 3
    repeated = ids_NK.repeat_interleave(weight_N, dim=0)
    assert torch.equal(
        measure_swaps(ids_NK, case.placement, case.hierarchy, weight_N),
        measure_swaps(repeated, case.placement, case.hierarchy),
    )


def test_descent_ends_where_no_swap_helps_and_every_step_lowers_q(a6000: Cluster) -> None:
    step = random_step([16] * 32, 64, 4, torch.Generator().manual_seed(2), skew=1.0)
    sets = TokenSets.of(step.expert_ids_NK, 64)
    scheme, table = hierarchical(3, True, a6000.hierarchy), SwapTable(sets, Placement.identity(64), a6000)
    before = table.times(scheme, RowBytes.alike(4096), SMOOTH).now_ms
    fixed = table.copy()
    descend(table, scheme, RowBytes.alike(4096), SMOOTH, Budget(None, 1))
    one = table.times(scheme, RowBytes.alike(4096), SMOOTH).now_ms
    descend(table, scheme, RowBytes.alike(4096), SMOOTH, Budget(None, 1000))
    end = table.times(scheme, RowBytes.alike(4096), SMOOTH)
    assert before > one > end.now_ms
    assert end.best() is None
    assert fixed.placement.is_identity and fixed.times(scheme, RowBytes.alike(4096), SMOOTH).now_ms == before


def test_budget_ends_by_steps_or_by_seconds() -> None:
    now = [0.0]
    budget = Budget(5.0, 3, clock=lambda: now[0])
    assert not budget.is_spent and budget.seconds_left == 5.0
    now[0] = 5.0
    assert budget.is_spent and budget.seconds == 5.0
    budget = Budget(None, 3, clock=lambda: now[0])
    assert budget.seconds_left == math.inf
    budget.steps = 2
    assert not budget.is_spent
    budget.steps = 3
    assert budget.is_spent


@pytest.mark.parametrize(("seconds", "steps"), [(None, None), (0.0, None), (float("nan"), None), (None, 0)])
def test_a_search_without_an_end_is_refused(seconds: float | None, steps: int | None) -> None:
    with pytest.raises(ValueError, match=r"needs an end|must be positive"):
        Budget(seconds, steps)
