"""Sequences of a trace, drawn anew: what is drawn, from which half, and for any number of ranks."""

import numpy as np
import pytest
import torch

from hiermoe.routing.resampled import HALF, Resampled
from tests.routing.worlds import a_request, a_trace


def a_source(num_ranks: int = 64, seed: int = 0) -> Resampled:
    """Ten sequences of four tokens."""
    trace = a_trace((5, 2, 2, 4))
    request = a_request(num_experts=16, topk=2, num_ranks=num_ranks, tokens_per_rank=4, seed=seed)
    return Resampled(trace, 1, request)


def sequences(source: Resampled) -> list[bytes]:
    """What the trace holds, cut into sequences by hand."""
    ids = source.trace.expert_ids[:, 1, :, :, :2].astype(np.int64)
    return [ids[i, rank].tobytes() for i in range(5) for rank in range(2)]


@pytest.mark.parametrize(("iteration", "half"), [(0, slice(0, 5)), (HALF - 1, slice(0, 5)), (HALF, slice(5, 10))])
def test_every_rank_holds_a_whole_sequence_of_its_half(iteration: int, half: slice) -> None:
    source = a_source()
    step = source.step(iteration)
    drawn = [rank.numpy().tobytes() for rank in step.expert_ids_NK.view(64, 4, 2)]
    assert set(drawn) == set(sequences(source)[half])
    assert torch.equal(step.source_N, torch.arange(64).repeat_interleave(4))
    assert step.expert_ids_NK.dtype == torch.int64 and (step.num_ranks, step.num_experts) == (64, 16)


def test_draw_depends_on_seed_and_iteration_alone() -> None:
    first = a_source().step(3).expert_ids_NK
    assert torch.equal(first, a_source().step(3).expert_ids_NK)
    assert not torch.equal(first, a_source().step(4).expert_ids_NK)
    assert not torch.equal(first, a_source(seed=1).step(3).expert_ids_NK)


def test_what_does_not_fit_is_refused() -> None:
    trace = a_trace((5, 2, 2, 4))
    with pytest.raises(ValueError, match="layer=2 is not among"):
        Resampled(trace, 2, a_request(num_experts=16, topk=2, tokens_per_rank=4))
    with pytest.raises(ValueError, match="topk=5 exceeds the 4 experts per token"):
        Resampled(trace, 0, a_request(num_experts=16, topk=5, tokens_per_rank=4))
    with pytest.raises(ValueError, match="tokens_per_rank=40 leaves fewer than two sequences"):
        Resampled(trace, 0, a_request(num_experts=16, topk=2, tokens_per_rank=40))
