"""Who exchanges with whom in a stage, and what an exchange costs."""

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from pydantic import Field
from torch import Tensor

from hiermoe.records.choices import unknown
from hiermoe.records.strict import Strict
from hiermoe.topology.hierarchy import Hierarchy

Ranks = TypeVar("Ranks", int, Tensor)
KINDS = ("inter", "intra")
Amount = TypeVar("Amount", float, Tensor, np.ndarray)


@dataclass(frozen=True)
class Peers:
    """Who exchanges with whom in a stage (paper, Sec. III-A).

    ``inter`` at level i: inside each level-(i-1) group, the GPUs of equal lane in its level-i sub-groups. ``intra`` at
    level i: all GPUs of one level-i group; at level 0 that is the world. Either way a GPU's peers are every
    ``stride``-th GPU of a block of contiguous ones.
    """

    kind: Literal["inter", "intra"]
    level: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("peers", self.kind, KINDS)

    def __str__(self) -> str:
        return f"{self.kind}{self.level}" if self.level else "world"

    @classmethod
    def of_siblings(cls, level: int, hierarchy: Hierarchy) -> "Peers":
        """How the groups of a level exchange: among equal lanes; the innermost are GPUs, and a lane each."""
        return cls("inter", level) if level < hierarchy.depth else cls("intra", level - 1)

    def size(self, hierarchy: Hierarchy) -> int:
        """Number of GPUs that exchange with each other."""
        block, stride = self._span(hierarchy)
        return block // stride

    def size_inside(self, level: int, hierarchy: Hierarchy) -> int:
        """Of these GPUs, how many share one GPU's group of a level, itself included."""
        block, stride = self._span(hierarchy)
        return max(1, min(block, hierarchy.lanes(level)) // stride)

    def members(self, rank: int, hierarchy: Hierarchy) -> tuple[int, ...]:
        """The GPUs that ``rank`` exchanges with, itself included, ascending."""
        block, stride = self._span(hierarchy)
        first = rank // block * block
        return tuple(range(first + rank % stride, first + block, stride))

    def position(self, rank: Ranks, hierarchy: Hierarchy) -> Ranks:
        """Where a GPU stands among its peers, from 0."""
        block, stride = self._span(hierarchy)
        return rank % block // stride

    def receiver(self, holder: Ranks, target: Ranks, hierarchy: Hierarchy) -> Ranks:
        """The peer of ``holder`` that stands where ``target`` does among its own: gets what is for ``target``."""
        block, stride = self._span(hierarchy)
        return holder // block * block + holder % stride + self.position(target, hierarchy) * stride

    def _span(self, hierarchy: Hierarchy) -> tuple[int, int]:
        """GPUs of a block, and the stride."""
        if self.kind == "intra":
            return hierarchy.lanes(self.level), 1
        return hierarchy.lanes(self.level - 1), hierarchy.lanes(self.level)


WORLD = Peers("intra", 0)


class Bend(Strict):
    """Where a line of small messages meets that of larger ones.

    Attributes:
        below_bytes: size at which they meet.
        ms_per_byte: by which the smaller ones take more (or less, negative) for each byte below that.
    """

    below_bytes: float = Field(gt=0)
    ms_per_byte: float


class AlphaBeta(Strict):
    """t = alpha + n * beta for n bytes at the busiest GPU (paper, Sec. III-B and Fig. 9).

    Attributes:
        alpha_ms: start-up time.
        beta_ms_per_byte: time per byte.
        bends: beyond the paper: the line is that of large messages, and small ones, whose protocols differ, lie off it.
        source: where the constants come from.
        published: False: derived by a reading, or measured; marked wherever it is used.
    """

    alpha_ms: float = Field(ge=0)
    beta_ms_per_byte: float = Field(ge=0)
    bends: tuple[Bend, ...] = ()
    source: str
    published: bool = True

    def ms(self, amount: Amount, bytes_each: float = 1.0, parts: int = 1) -> Amount:
        """Time of ``amount`` bytes, or things of ``bytes_each`` bytes: a number, a tensor or an array of them.

        In ``parts`` equal parts, one after another, each starts up anew.
        """
        time = self.alpha_ms * parts + amount * (self.beta_ms_per_byte * bytes_each)
        for bend in self.bends:
            missing = bend.below_bytes * parts - amount * bytes_each
            time = time + (missing + abs(missing)) * (bend.ms_per_byte / 2)
        return time  # pyright: ignore[reportReturnType]

    def times(self, alpha: float, beta: float) -> "AlphaBeta":
        """Both constants multiplied, each by a factor of its own."""
        bends = tuple(bend.model_copy(update={"ms_per_byte": bend.ms_per_byte * beta}) for bend in self.bends)
        changed = {"alpha_ms": self.alpha_ms * alpha, "beta_ms_per_byte": self.beta_ms_per_byte * beta, "bends": bends}
        return self.model_copy(update=changed)
