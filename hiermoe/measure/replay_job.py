"""What ranks replay: a job that all of them know, and questions with known answers."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hiermoe.dispatch.dispatcher import TokenDispatcher
from hiermoe.model import LayerSizes
from hiermoe.routing.step import RoutingStep
from hiermoe.topology.cluster import Cluster

_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
_LARGEST_EXACT = {torch.bfloat16: 2**8, torch.float32: 2**24, torch.float64: 2**53}
_FACTORS = 3  # experts multiply by 1, 2 or 3
_WEIGHTS = 2  # routing weights are 1 or 2


@dataclass(frozen=True)
class ReplayJob:
    """What every rank must know.

    Attributes:
        cluster: hierarchy and constants.
        sizes: of the layer.
        layer: what records call the layer.
        counted: for every iteration, whether it counts.
        routing_iterations: for every iteration, which one of the source it is.
        first: iteration to begin with.
        routing: folder of one file for every iteration of the routing source.
        timeout: of a collective.
        device: of the tensors.
        one_machine: whether all ranks have the same clock.
    """

    cluster: Cluster
    sizes: LayerSizes
    layer: int
    counted: tuple[bool, ...]
    routing_iterations: tuple[int, ...]
    first: int
    routing: Path
    timeout: timedelta
    device: str = "cpu"
    one_machine: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return _DTYPES[self.sizes.element_bytes]

    def save(self, routing_iteration: int, step: RoutingStep) -> None:
        """Write one iteration of the source for the ranks to read."""
        with self._path(routing_iteration).open("wb") as file:
            np.savez(
                file, ids=step.expert_ids_NK.numpy().astype(np.int16), source=step.source_N.numpy().astype(np.int32)
            )

    def load(self, routing_iteration: int, rank: int) -> Tensor:
        """Experts of one rank's tokens: int64 [T, K]."""
        with np.load(self._path(routing_iteration)) as stored:
            return torch.from_numpy(stored["ids"][stored["source"] == rank].astype(np.int64))

    def _path(self, routing_iteration: int) -> Path:
        return self.routing / f"{routing_iteration}.npz"

    def check(self) -> None:
        """Refuse what has no exact answer.

        Raises:
            ValueError: an element size without a dtype, or so many experts per token that sums would round.
        """
        topk, element_bytes = self.sizes.topk, self.sizes.element_bytes
        if element_bytes not in _DTYPES:
            raise ValueError(f"element_bytes={element_bytes} has no dtype here; choose from {sorted(_DTYPES)}")
        if topk * _FACTORS * _WEIGHTS > _LARGEST_EXACT[self.dtype]:
            raise ValueError(f"topk={topk}: sums of so many integers round in {self.dtype}; use element_bytes=4")


@dataclass(frozen=True)
class Question:
    """One rank's inputs of one iteration, whose answer is known.

    Attributes:
        ids_TK: int64 [T, K], experts of its tokens.
        x_TM: hidden states.
        weight_TK: routing weights, float32.
        gradient_TM: of the output.
    """

    ids_TK: Tensor
    x_TM: Tensor
    weight_TK: Tensor
    gradient_TM: Tensor

    @classmethod
    def draw(cls, ids_TK: Tensor, job: ReplayJob, generator: torch.Generator) -> "Question":
        """Random integers."""

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8).to(job.device)

        shape_TM = len(ids_TK), job.sizes.hidden_size
        return cls(
            ids_TK=ids_TK.to(job.device),
            x_TM=integers(-1, 1, *shape_TM).to(job.dtype),
            weight_TK=integers(1, _WEIGHTS, *ids_TK.shape).float(),
            gradient_TM=integers(-1, 1, *shape_TM).to(job.dtype),
        )

    def ask(self, dispatcher: TokenDispatcher, job: ReplayJob) -> int:
        """Dispatch, let experts multiply, combine, and go backward. *Collective.*

        Returns:
            Elements of the output, of the inputs' gradient and of the routing weights' gradient that are wrong.
        """
        x_TM, weight_TK = self.x_TM.detach().requires_grad_(), self.weight_TK.detach().requires_grad_()
        arrived = dispatcher.dispatch(x_TM, self.ids_TK, weight_TK)
        factor_P = factor_of(dispatcher.local_experts).repeat_interleave(arrived.rows_per_slot).to(job.device)
        y_PM = (arrived.rows_PM * (arrived.weights_P * factor_P)[:, None]).to(arrived.rows_PM.dtype)
        output_TM = dispatcher.combine(y_PM, arrived.plan)
        output_TM.backward(self.gradient_TM)
        assert x_TM.grad is not None and weight_TK.grad is not None
        factor_TK = factor_of(self.ids_TK)
        if arrived.plan is not None:
            factor_TK *= arrived.plan.kept_TK  # a lossy scheme drops pairs
        scale_T1 = (self.weight_TK * factor_TK).sum(1, keepdim=True)
        alignment_T1 = (self.gradient_TM.float() * self.x_TM.float()).sum(1, keepdim=True)
        wrong = output_TM.detach().float().ne(self.x_TM.float() * scale_T1).sum()
        wrong += x_TM.grad.float().ne(self.gradient_TM.float() * scale_T1).sum()
        wrong += weight_TK.grad.ne(alignment_T1 * factor_TK).sum()
        return int(wrong)


def factor_of(expert_ids: Tensor) -> Tensor:
    """What an expert multiplies by: float32 in the shape of the ids."""
    return (1 + expert_ids % _FACTORS).float()
