"""What ranks replay: a job that all of them know, and questions with known answers."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
        num_experts: E.
        topk: K.
        hidden_size: M.
        element_bytes: v, of a hidden state's element.
        expert_parameters: of one expert.
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
    num_experts: int
    topk: int
    hidden_size: int
    element_bytes: int
    expert_parameters: int
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
        return _DTYPES[self.element_bytes]

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
        if self.element_bytes not in _DTYPES:
            raise ValueError(f"element_bytes={self.element_bytes} has no dtype here; choose from {sorted(_DTYPES)}")
        if self.topk * _FACTORS * _WEIGHTS > _LARGEST_EXACT[self.dtype]:
            raise ValueError(f"topk={self.topk}: sums of so many integers round in {self.dtype}; use element_bytes=4")


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

        num_tokens = len(ids_TK)
        return cls(
            ids_TK=ids_TK.to(job.device),
            x_TM=integers(-1, 1, num_tokens, job.hidden_size).to(job.dtype),
            weight_TK=integers(1, _WEIGHTS, *ids_TK.shape).float(),
            gradient_TM=integers(-1, 1, num_tokens, job.hidden_size).to(job.dtype),
        )

    def ask(self, dispatcher: Any, job: ReplayJob) -> int:
        """Dispatch, let experts multiply, combine, and go backward. *Collective.*

        Returns:
            Elements of the output, of the inputs' gradient and of the routing weights' gradient that are wrong.
        """
        num_experts = job.num_experts
        x_TM = self.x_TM.detach().requires_grad_()
        probs_TE = self.weight_TK.new_zeros(len(x_TM), num_experts).scatter_(1, self.ids_TK, self.weight_TK)
        probs_TE.requires_grad_()
        routing_map_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(1, self.ids_TK, True)
        hidden, probs = dispatcher.dispatch_preprocess(x_TM.unsqueeze(1), routing_map_TE, probs_TE)
        hidden, probs = dispatcher.token_dispatch(hidden, probs)
        rows_PM, rows_per_expert, weight_P = dispatcher.dispatch_postprocess(hidden, probs)
        first = dispatcher.ep_group.rank() * len(rows_per_expert)
        placement = getattr(dispatcher, "placement", None)  # stock classes have experts in their own slots
        expert_at = torch.arange(num_experts) if placement is None else placement.expert_at_S
        local_experts = expert_at[first : first + len(rows_per_expert)]
        factor_P = factor_of(local_experts).repeat_interleave(torch.as_tensor(rows_per_expert).cpu()).to(job.device)
        y_PM = (rows_PM * (weight_P * factor_P)[:, None]).to(rows_PM.dtype)
        output = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(y_PM)))
        output_TM = output.view_as(x_TM)
        output_TM.backward(self.gradient_TM)
        assert x_TM.grad is not None and probs_TE.grad is not None
        kept_TK = kept_pairs(dispatcher, routing_map_TE).gather(1, self.ids_TK)
        factor_TK = factor_of(self.ids_TK) * kept_TK
        scale_T1 = (self.weight_TK * factor_TK).sum(1, keepdim=True)
        alignment_T1 = (self.gradient_TM.float() * self.x_TM.float()).sum(1, keepdim=True)
        wrong = output_TM.detach().float().ne(self.x_TM.float() * scale_T1).sum()
        wrong += x_TM.grad.float().ne(self.gradient_TM.float() * scale_T1).sum()
        wrong += probs_TE.grad.gather(1, self.ids_TK).ne(alignment_T1 * factor_TK).sum()
        return int(wrong)


def factor_of(expert_ids: Tensor) -> Tensor:
    """What an expert multiplies by: float32 in the shape of the ids."""
    return (1 + expert_ids % _FACTORS).float()


def kept_pairs(dispatcher: Any, routing_map_TE: Tensor) -> Tensor:
    """Which pairs a lossy scheme kept: bool [T, E]; all of them where it is not lossy."""
    plan = getattr(dispatcher, "plan", None)
    if plan is None or not plan.scheme.lossy:
        return routing_map_TE
    kept = routing_map_TE.new_zeros(routing_map_TE.numel() + 1)
    kept[plan.pair_index_P] = True
    return kept[:-1].view_as(routing_map_TE)
