"""A dispatch algorithm as data: the stages that rows pass through on their way to the experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from hiermoe.records.choices import unknown
from hiermoe.records.status import NotApplicable
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import Peers

ROWS = ("pair", "token")


@dataclass(frozen=True)
class Stage:
    """One AlltoAll of a scheme. A row goes to the peer that stands where its destination does among its own peers.

    Attributes:
        peers: who exchanges.
        rows: what a row is: ``pair``, one per (token, expert); ``token``, one per token and destination group.
    """

    peers: Peers
    rows: Literal["pair", "token"]

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise unknown("rows", self.rows, ROWS)

    def level(self, hierarchy: Hierarchy) -> int:
        """Level of the groups that a row is addressed to."""
        return self.peers.level if self.peers.kind == "inter" else hierarchy.depth


@dataclass(frozen=True)
class Padding:
    """Equal splits as in Tutel: C rows for every (source, expert).

    Attributes:
        capacity_factor: 0: C is the largest count of the step, nothing is dropped. Above 0: C = K * int(cf * ceil(T/E))
            and pairs beyond C are dropped.
    """

    capacity_factor: float

    def __post_init__(self) -> None:
        if self.capacity_factor < 0:
            raise ValueError(f"capacity_factor={self.capacity_factor} is negative")


@dataclass(frozen=True)
class DispatchScheme:
    """Stages that together bring every selected token to the GPUs of its experts.

    The planner derives traffic and time from it, the executor runs it.

    Attributes:
        name: as records have it.
        stages: one after another.
        padding: equal splits; None for what routing asks.
        chunks: C, parts that rows are cut into, by columns. While one passes a stage, that before it passes the next.
    """

    name: str
    stages: tuple[Stage, ...]
    padding: Padding | None = None
    chunks: int = 1

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError(f"scheme {self.name} has no stages")
        if self.chunks < 1 or (self.chunks > 1 and len(self.stages) == 1):
            raise ValueError(f"scheme {self.name}: chunks={self.chunks} of {len(self.stages)} stages have no meaning")
        if self.padding and any(stage.rows != "pair" for stage in self.stages):
            raise ValueError(f"scheme {self.name}: only token-expert pairs can be padded per expert")
        if any(a.rows == "pair" and b.rows == "token" for a, b in pairwise(self.stages)):
            raise ValueError(
                f"scheme {self.name}: once a token is split into its pairs, no later stage can send it whole"
            )

    @property
    def dimension(self) -> int:
        """The paper's d: number of stages."""
        return len(self.stages)

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Of every stage, as records have it: ``1:inter1``."""
        return tuple(f"{number}:{stage.peers}" for number, stage in enumerate(self.stages, start=1))

    @property
    def lossy(self) -> bool:
        """Whether the scheme may drop token-expert pairs."""
        return self.padding is not None and self.padding.capacity_factor > 0

    @property
    def deduplicates(self) -> bool:
        """Whether every stage sends a token once per group."""
        return all(stage.rows == "token" for stage in self.stages)


def hierarchical(dimension: int, deduplicate: bool, hierarchy: Hierarchy, chunks: int = 1) -> DispatchScheme:
    """Hd or HDd (paper, Sec. III-A): Inter-level-1 ... Inter-level-(d-1), then Intra-level-(d-1).

    Args:
        dimension: d, from 1 (one AlltoAll over all GPUs) to D.
        deduplicate: HDd if true, Hd if not.
        hierarchy: gives D.
        chunks: C, beyond the paper; ``HDdxC`` where there are several.

    Raises:
        NotApplicable: d outside 1..D.
    """
    if not 1 <= dimension <= hierarchy.depth:
        raise NotApplicable(f"dimension={dimension} is outside 1..{hierarchy.depth}, the levels of the hierarchy")
    rows = "token" if deduplicate else "pair"
    name = f"{'HD' if deduplicate else 'H'}{dimension}" + (f"x{chunks}" if chunks > 1 else "")
    inter = tuple(Stage(Peers("inter", level), rows) for level in range(1, dimension))
    return DispatchScheme(name, (*inter, Stage(Peers("intra", dimension - 1), rows)), chunks=chunks)


def fixed_dimension(hierarchy: Hierarchy, dimension: int, deduplicate: bool = True) -> tuple[DispatchScheme, ...]:
    """The one candidate of a system with a fixed d."""
    return (hierarchical(dimension, deduplicate, hierarchy),)


def every_dimension(hierarchy: Hierarchy) -> tuple[DispatchScheme, ...]:
    """HD1 ... HDD, the candidates that Algorithm 1 chooses from (HierD-AlltoAll)."""
    return tuple(hierarchical(d, True, hierarchy) for d in range(1, hierarchy.depth + 1))


def pipelined(
    hierarchy: Hierarchy,
    dimensions: Sequence[int] | None = None,
    chunks: Sequence[int] = (1, 2, 4, 8),
    cut: Sequence[int] = (2,),
) -> tuple[DispatchScheme, ...]:
    """HDd, and some d in several numbers of chunks, so that Algorithm 1 chooses C together with d.

    Args:
        hierarchy: gives D.
        dimensions: d; None for 1 ... D.
        chunks: C.
        cut: d that come in chunks. A calibration times the two stages of HD2 in chunks; what it finds is of them alone.
    """
    return tuple(
        hierarchical(d, True, hierarchy, parts)
        for d in dimensions or range(1, hierarchy.depth + 1)
        for parts in (chunks if d in cut else (1,))
    )


@lru_cache(maxsize=64)
def stage_routes(scheme: DispatchScheme, hierarchy: Hierarchy) -> tuple[Tensor, ...]:
    """For every stage: which GPU hands a row to which, by (source, destination group).

    A row that started at source s and is addressed to group b of the stage's level (pairs: to GPU b) sits at one
    certain GPU before the stage and at one certain GPU after it, whatever the routing.

    Returns:
        One int64 tensor [G, groups] a stage, ``sender * G + receiver``; groups is U[level] for ``token`` rows and G
        for ``pair`` rows.

    Raises:
        ValueError: the stages do not bring every row to its destination.
    """
    num_ranks = hierarchy.num_ranks
    target = torch.arange(num_ranks).expand(num_ranks, num_ranks)  # [source, destination GPU]
    holder = torch.arange(num_ranks)[:, None].expand(num_ranks, num_ranks)
    routes = []
    for stage in scheme.stages:
        receiver = stage.peers.receiver(holder, target, hierarchy)
        lanes = hierarchy.lanes(stage.level(hierarchy)) if stage.rows == "token" else 1
        route = (holder * num_ranks + receiver).view(num_ranks, -1, lanes)  # [source, group, GPU of the group]
        if not bool((route == route[..., :1]).all()):
            raise ValueError(f"scheme {scheme.name}: stage {stage.peers} cannot send a token once per group")
        routes.append(route[..., 0].contiguous())
        holder = receiver
    if not torch.equal(holder, target):
        raise ValueError(f"scheme {scheme.name} does not bring every row to its destination")
    return tuple(routes)
