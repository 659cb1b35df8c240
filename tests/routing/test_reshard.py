"""Regrouping keeps every token, in order, and invents none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiermoe.routing.trace import RoutingTrace
from tests.routing.worlds import a_trace


def tokens_in_order(array: np.ndarray) -> np.ndarray:
    """[layer, all tokens, k], iteration after iteration, rank after rank."""
    return np.concatenate([step.reshape(step.shape[0], -1, step.shape[-1]) for step in array], axis=1)


@given(
    old=st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 4), st.integers(1, 6)),
    num_ranks=st.integers(1, 5),
    tokens=st.integers(1, 6),
)
@settings(max_examples=100, derandomize=True, deadline=None)
def test_contiguous_tokens_are_cut_anew(old: tuple[int, int, int, int], num_ranks: int, tokens: int) -> None:
    plain = a_trace(old)
    weights = np.random.default_rng(1).random(plain.expert_ids.shape).astype(np.float16)
    trace = RoutingTrace(plain.expert_ids, plain.num_tokens, plain.metadata, weights)
    total, per_iteration = old[0] * old[2] * old[3], num_ranks * tokens
    if per_iteration > total:
        with pytest.raises(ValueError, match=f"has {total} tokens, one iteration asks {per_iteration}:"):
            trace.reshard(num_ranks, tokens)
        return
    regrouped = trace.reshard(num_ranks, tokens)
    count = total // per_iteration
    assert regrouped.expert_ids.shape == (count, old[1], num_ranks, tokens, 4)
    assert (regrouped.num_tokens == tokens).all()
    kept = count * per_iteration
    np.testing.assert_array_equal(tokens_in_order(regrouped.expert_ids), tokens_in_order(trace.expert_ids)[:, :kept])
    assert regrouped.weights is not None
    np.testing.assert_array_equal(tokens_in_order(regrouped.weights), tokens_in_order(weights)[:, :kept])
    drawn_from = [i * per_iteration // (old[2] * old[3]) for i in range(count)]
    assert regrouped.metadata.training_step == [trace.metadata.training_step[i] for i in drawn_from]
    assert regrouped.metadata.loss == [trace.metadata.loss[i] for i in drawn_from]


def test_same_ranks_and_tokens_leave_the_trace_alone() -> None:
    trace = a_trace(num_tokens=[[5, 0], [3, 2], [1, 5]])
    assert trace.reshard(2, 5) is trace


@given(data=st.data(), num_ranks=st.integers(1, 5), tokens=st.integers(1, 6))
@settings(max_examples=100, derandomize=True, deadline=None)
def test_ranks_that_are_not_full_are_cut_anew_without_their_padding(
    data: st.DataObject, num_ranks: int, tokens: int
) -> None:
    counts = data.draw(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=4))
    trace = a_trace((len(counts), 2, 3, 5), num_tokens=counts)
    per_iteration = num_ranks * tokens
    kept = [  # token after token, with the iteration that each is from
        (i, trace.expert_ids[i, :, g, t]) for i, row in enumerate(counts) for g, n in enumerate(row) for t in range(n)
    ]
    count = len(kept) // per_iteration
    if (num_ranks, tokens) == (3, 5):
        assert trace.reshard(num_ranks, tokens) is trace
        return
    if count == 0:
        with pytest.raises(ValueError, match=f"has {len(kept)} tokens, one iteration asks {per_iteration}"):
            trace.reshard(num_ranks, tokens)
        return
    regrouped = trace.reshard(num_ranks, tokens)
    assert (regrouped.num_tokens == tokens).all() and regrouped.expert_ids.shape[:4] == (count, 2, num_ranks, tokens)
    expected = np.stack([ids_LK for _, ids_LK in kept[: count * per_iteration]], axis=1)
    np.testing.assert_array_equal(tokens_in_order(regrouped.expert_ids), expected)
    assert regrouped.metadata.training_step == [10 * kept[i * per_iteration][0] for i in range(count)]
