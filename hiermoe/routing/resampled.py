"""Recorded routing for any number of GPUs: sequences of a trace, drawn anew for every rank and iteration.

A trace lasts for few iterations of many GPUs. Drawn with replacement, whole sequences keep what real routing has
(experts that fire together inside a token, popularity that changes along a text), while the number of ranks has no
limit. What it loses: a sequence may be held by several ranks at once, and training's drift over the trace is mixed. The
second half of the trace is drawn from in the second half of the iterations alone, so it stays unseen until it is
measured (:func:`hiermoe.routing.step.iteration_schedule`).
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from hiermoe.routing.step import RoutingRequest, RoutingStep
from hiermoe.routing.synthetic import full_step, generator
from hiermoe.routing.trace import RoutingTrace, load_recorded

HALF = 5040 * 4096  # iterations of either half; a multiple of any usual number of replicas, which take turns


@dataclass(frozen=True)
class Resampled:
    """Sequences of one layer of a trace as a source of routing steps.

    Attributes:
        trace: as recorded.
        layer: position in the trace.
        request: of the run; a sequence has as many tokens as a rank holds.

    Raises:
        ValueError: K exceeds what was recorded, there is no such layer, or fewer than two sequences of that length.
    """

    trace: RoutingTrace
    layer: int
    request: RoutingRequest

    def __post_init__(self) -> None:
        self.trace.check(self.layer, self.request.topk)
        if len(self.expert_ids_STK) < 2:
            raise ValueError(f"tokens_per_rank={self.request.tokens_per_rank} leaves fewer than two sequences to draw")

    @cached_property
    def expert_ids_STK(self) -> torch.Tensor:
        """Experts of every sequence: uint8 or int16 [S, T, K]."""
        ids = self.trace.reshard(1, self.request.tokens_per_rank).expert_ids[:, self.layer, 0, :, : self.request.topk]
        return torch.from_numpy(ids if ids.dtype.itemsize == 1 else ids.astype("int16"))

    @property
    def num_distinct(self) -> int:
        """Iterations of both halves."""
        return 2 * HALF

    def step(self, iteration: int) -> RoutingStep:
        """Routing of one iteration."""
        r, count = self.request, len(self.expert_ids_STK)
        middle = count - count // 2
        low, high = (0, middle) if iteration < HALF else (middle, count)
        drawn_G = torch.from_numpy(generator("resampled", r.seed, iteration).integers(low, high, r.num_ranks))
        ids_NK = self.expert_ids_STK[drawn_G].view(-1, r.topk).long()
        return full_step(ids_NK, r)


def open_resampled(request: RoutingRequest, path: str, layer: int = 0, stage: str = "") -> Resampled:
    """A recorded trace to draw sequences from.

    Args:
        request: G, T, E and K of the run.
        path: the trace; in it ``{trace}`` is the model's trace name, ``{num_experts}`` E, and ``{stage}`` the stage.
        layer: position of the layer in the trace.
        stage: of the training that was recorded.

    Raises:
        NotApplicable: no such trace was recorded.
        ValueError: the trace is damaged, or its E or K do not fit.
    """
    return Resampled(load_recorded(request, path, stage), layer, request)
