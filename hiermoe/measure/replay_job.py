"""What ranks replay: a job that all of them know."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hiermoe.model import LayerSizes
from hiermoe.routing.step import RoutingStep
from hiermoe.topology.cluster import Cluster

_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
_LARGEST_EXACT = {torch.bfloat16: 2**8, torch.float32: 2**24, torch.float64: 2**53}
FACTORS = 3  # experts multiply by 1, 2 or 3
WEIGHTS = 2  # routing weights are 1 or 2


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

    Raises:
        ValueError: an element size without a dtype, or so many experts per token that sums would round.
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

    def __post_init__(self) -> None:
        topk, element_bytes = self.sizes.topk, self.sizes.element_bytes
        if element_bytes not in _DTYPES:
            raise ValueError(f"element_bytes={element_bytes} has no dtype here; choose from {sorted(_DTYPES)}")
        if topk * FACTORS * WEIGHTS > _LARGEST_EXACT[self.dtype]:
            raise ValueError(f"topk={topk}: sums of so many integers round in {self.dtype}; use element_bytes=4")

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
