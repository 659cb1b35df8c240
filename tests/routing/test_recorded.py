"""A recorded trace as a source of routing steps."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hiermoe.records.status import NotApplicable
from hiermoe.routing.trace import RecordedRouting, open_recorded
from tests.routing.worlds import a_request, a_trace


def test_step_holds_the_first_choices_of_every_token_that_is_not_padding() -> None:
    counts = [[5, 0], [3, 2], [1, 5]]
    trace = a_trace(num_tokens=counts)
    source = RecordedRouting(trace, layer=1, topk=3)
    assert source.num_distinct == 3
    for iteration, per_rank in enumerate(counts):
        step = source.step(iteration)
        expected = [trace.expert_ids[iteration, 1, rank, :count, :3] for rank, count in enumerate(per_rank)]
        assert step.expert_ids_NK.dtype == torch.int64
        np.testing.assert_array_equal(step.expert_ids_NK.numpy(), np.concatenate(expected))
        assert torch.bincount(step.source_N, minlength=2).tolist() == per_rank
        assert (step.num_ranks, step.num_experts, step.topk) == (2, 16, 3)


@pytest.mark.parametrize("layer", [-1, 2])
def test_layer_that_was_not_recorded_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer={layer} is not among the trace's 2 layers"):
        RecordedRouting(a_trace(), layer, topk=2)


def test_more_experts_than_recorded_are_refused() -> None:
    with pytest.raises(ValueError, match="topk=5 exceeds the 4 experts per token that the trace recorded"):
        RecordedRouting(a_trace(), 0, topk=5)


def test_open_fills_the_path_and_regroups(tmp_path: Path) -> None:
    a_trace((4, 2, 2, 6)).save(tmp_path / "small_e16_early.trace")
    request = a_request(num_experts=16, topk=3, num_ranks=3, tokens_per_rank=4)
    source = open_recorded(request, str(tmp_path / "small_e{num_experts}_{stage}.trace"), layer=1, stage="early")
    assert source.num_distinct == 4
    assert source.step(3).expert_ids_NK.shape == (12, 3)


def test_open_without_a_trace_is_not_applicable(tmp_path: Path) -> None:
    with pytest.raises(NotApplicable, match=r"no trace was recorded at .*any_e128\.trace"):
        open_recorded(a_request(), str(tmp_path / "{trace}_e{num_experts}.trace"))


def test_open_refuses_another_number_of_experts(tmp_path: Path) -> None:
    a_trace().save(tmp_path / "a.trace")
    with pytest.raises(ValueError, match=r"a\.trace was recorded with num_experts=16, the model has 32") as raised:
        open_recorded(a_request(num_experts=32, topk=2, num_ranks=2, tokens_per_rank=5), str(tmp_path / "a.trace"))
    assert not isinstance(raised.value, NotApplicable)


def test_open_refuses_more_experts_per_token_than_recorded(tmp_path: Path) -> None:
    a_trace().save(tmp_path / "a.trace")
    with pytest.raises(ValueError, match="topk=6 exceeds the 4 experts per token"):
        open_recorded(a_request(num_experts=16, topk=6, num_ranks=2, tokens_per_rank=5), str(tmp_path / "a.trace"))


def test_open_refuses_a_damaged_trace(tmp_path: Path) -> None:
    (tmp_path / "a.trace").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="truncated or not a trace") as raised:
        open_recorded(a_request(), str(tmp_path / "a.trace"))
    assert not isinstance(raised.value, NotApplicable)
