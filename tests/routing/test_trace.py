"""A trace is what was recorded or it is refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from hiermoe.routing.trace import RoutingTrace
from tests.routing.worlds import a_trace, some_metadata

TRACE = a_trace()


def rebuilt(**changes: Any) -> RoutingTrace:
    return dataclasses.replace(TRACE, **changes)


@pytest.mark.parametrize(("num_experts", "dtype"), [(5, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_ids_take_the_smallest_dtype_that_holds_them(num_experts: int, dtype: type) -> None:
    trace = a_trace((2, 1, 2, 300), num_experts=num_experts)
    assert trace.expert_ids.dtype == dtype
    assert trace.expert_ids.max() == num_experts - 1


def test_an_expert_twice_in_a_token_is_refused() -> None:
    ids = TRACE.expert_ids.copy()
    ids[1, 0, 1, 2, 3] = ids[1, 0, 1, 2, 0]
    with pytest.raises(ValueError, match=r"small: iteration 1 has a token with an expert twice"):
        rebuilt(expert_ids=ids)


def test_an_expert_out_of_range_is_refused() -> None:
    ids = TRACE.expert_ids.copy()
    ids[2, 1, 0, 0, 0] = 16
    with pytest.raises(ValueError, match=r"small: iteration 2 names expert 16, num_experts is 16"):
        rebuilt(expert_ids=ids)


@pytest.mark.parametrize("value", [-1, 256])
def test_an_expert_that_the_dtype_would_wrap_is_refused(value: int) -> None:
    ids = TRACE.expert_ids.astype(np.int64)
    ids[0, 0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=rf"expert_ids has values .*{value}.*num_experts is 16"):
        rebuilt(expert_ids=ids)


def test_ids_that_are_not_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="expert_ids has dtype float32; the rule is an integer"):
        rebuilt(expert_ids=TRACE.expert_ids.astype(np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_ids": TRACE.expert_ids[0]}, r"expert_ids has 4 axes; the rule is \[iteration, layer, rank, T, k\]"),
        ({"num_tokens": TRACE.num_tokens[:2]}, r"num_tokens has shape \(2, 2\), expert_ids asks for \(3, 2\)"),
        ({"num_tokens": TRACE.num_tokens + 1}, r"num_tokens outside 0\.\.5"),
        ({"num_tokens": TRACE.num_tokens - 6}, r"num_tokens outside 0\.\.5"),
        ({"expert_ids": TRACE.expert_ids[..., :3]}, "expert_ids stores 3 experts per token, metadata says 4"),
        ({"metadata": some_metadata(layers=3)}, "metadata names 3 layers, expert_ids has 2"),
        ({"metadata": some_metadata(loss=[1.0])}, "metadata has 3 training steps and 1 losses for 3 iterations"),
        ({"metadata": some_metadata(training_step=[1])}, "metadata has 1 training steps and 3 losses for 3 iterations"),
        ({"weights": np.zeros((3, 2, 2, 5, 3), np.float16)}, "weights must have the shape of expert_ids"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        rebuilt(**changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes", [{"topk": 0}, {"topk": 5}, {"num_recorded": 17, "topk": 17}, {"loss": ["low"]}, {"unknown": 1}]
)
def test_metadata_that_breaks_a_rule_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        some_metadata(**changes)


def test_padding_may_hold_anything() -> None:
    counts = [[5, 0], [3, 2], [1, 5]]
    ids = a_trace(num_tokens=counts).expert_ids.copy()
    for iteration, per_rank in enumerate(counts):
        for rank, count in enumerate(per_rank):
            ids[iteration, :, rank, count:] = 255  # out of range, and all alike
    trace = rebuilt(expert_ids=ids, num_tokens=np.array(counts, np.int32))
    assert trace.num_tokens.sum() == 16
