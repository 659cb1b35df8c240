"""Who exchanges with whom in a stage, and what an exchange costs."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from hiermoe.records.strict import Strict
from hiermoe.topology.hierarchy import Hierarchy

PeerKind = Literal["world", "inter", "intra"]


@dataclass(frozen=True)
class Peers:
    """Who exchanges with whom in a stage (paper, Sec. III-A).

    ``world``: all GPUs. ``inter`` at level i: inside each level-(i-1) group, the GPUs of equal lane in its level-i
    sub-groups. ``intra`` at level i: all GPUs of one level-i group.
    """

    kind: PeerKind
    level: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "world" else f"{self.kind}{self.level}"

    def size(self, hierarchy: Hierarchy) -> int:
        """Number of GPUs that exchange with each other."""
        if self.kind == "world":
            return hierarchy.num_ranks
        if self.kind == "inter":
            return hierarchy.U[self.level] // hierarchy.U[self.level - 1]
        return hierarchy.lanes(self.level)

    def size_inside(self, level: int, hierarchy: Hierarchy) -> int:
        """Of these GPUs, how many share one GPU's group of a level, itself included."""
        if self.kind == "inter":
            return 1 if level >= self.level else self.size(hierarchy)
        return min(self.size(hierarchy), hierarchy.lanes(level))


class AlphaBeta(Strict):
    """t = alpha + n * beta for n bytes at the busiest GPU (paper, Sec. III-B and Fig. 9).

    Attributes:
        alpha_ms: start-up time.
        beta_ms_per_byte: time per byte.
        source: where the constants come from.
    """

    alpha_ms: float = Field(ge=0)
    beta_ms_per_byte: float = Field(ge=0)
    source: str
    published: bool = True  # False: derived by a reading, marked wherever it is used
