"""Steps, requests, and the order in which a run walks through a source."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiermoe.routing.step import experts_per_rank, first_measured, iteration_schedule, make_step
from tests.routing.worlds import a_request


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=5))
@settings(max_examples=50, derandomize=True, deadline=None)
def test_step_keeps_each_ranks_tokens_and_drops_padding(counts: list[int]) -> None:
    ids_GTK = torch.arange(len(counts) * 4 * 2).view(len(counts), 4, 2)
    step = make_step(ids_GTK, torch.tensor(counts), 1000)
    assert step.expert_ids_NK.tolist() == [row for g, n in enumerate(counts) for row in ids_GTK[g, :n].tolist()]
    assert step.source_N.tolist() == [g for g, n in enumerate(counts) for _ in range(n)]
    assert step.expert_ids_NK.dtype == step.source_N.dtype == torch.int64
    assert (step.topk, step.num_ranks, step.num_experts) == (2, len(counts), 1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"topk": 0}, "topk=0 must be at least 1"),
        ({"num_ranks": -1}, "num_ranks=-1 must be at least 1"),
        ({"tokens_per_rank": 0}, "tokens_per_rank=0 must be at least 1"),
        ({"topk": 129}, "topk=129 exceeds num_experts=128"),
        ({"num_groups": 0, "group_topk": 1}, "num_groups=0 must be at least 1"),
        ({"num_groups": 7, "group_topk": 1}, "num_experts=128 is not divisible by num_groups=7"),
        ({"num_groups": 8}, r"group_topk=None is outside 1\.\.8"),
        ({"num_groups": 8, "group_topk": 9}, r"group_topk=9 is outside 1\.\.8"),
        ({"num_groups": 64, "group_topk": 3}, "topk=8 exceeds the experts of group_topk=3 groups"),
    ],
)
def test_request_that_breaks_a_rule_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a_request(**changes)


def test_experts_are_shared_out_evenly_or_not_at_all() -> None:
    assert experts_per_rank(128, 32) == 4
    with pytest.raises(ValueError, match="num_experts=130 is not divisible by ep_size=32"):
        experts_per_rank(130, 32)


@given(iterations=st.integers(2, 60), num_distinct=st.integers(2, 40))
@settings(max_examples=300, derandomize=True, deadline=None)
def test_what_is_measured_was_not_seen_before(iterations: int, num_distinct: int) -> None:
    schedule = iteration_schedule(iterations, num_distinct)
    start = first_measured(iterations, num_distinct)
    seen, measured = schedule[:start], schedule[start:]
    assert len(schedule) == iterations
    assert 1 <= len(measured) <= iterations // 2
    assert len(set(measured)) == len(measured)
    assert not set(seen) & set(measured)
    half = num_distinct - num_distinct // 2
    assert measured == list(range(half, half + len(measured)))
    assert set(schedule) <= set(range(num_distinct))
    assert all(later == (earlier + 1) % half for earlier, later in pairwise(seen))
    assert seen[-1] == half - 1  # the run goes over into the held-out half without a jump


@given(iterations=st.integers(2, 60))
@settings(max_examples=30, derandomize=True, deadline=None)
def test_run_as_long_as_its_source_takes_everything_in_order(iterations: int) -> None:
    assert iteration_schedule(iterations, iterations) == list(range(iterations))
    assert iteration_schedule(iterations, None) == list(range(iterations))
    assert first_measured(iterations, None) == iterations - iterations // 2


@pytest.mark.parametrize(("iterations", "num_distinct"), [(1, None), (1, 4), (4, 1)])
def test_a_run_needs_two_iterations(iterations: int, num_distinct: int | None) -> None:
    with pytest.raises(ValueError, match=f"iterations={iterations} of num_distinct={num_distinct}"):
        iteration_schedule(iterations, num_distinct)
