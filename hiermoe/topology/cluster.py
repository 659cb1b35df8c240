"""A cluster: its hierarchy and what an AlltoAll costs on each part of it."""

import math
import operator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hiermoe.topology.cluster_files import cluster_file, cluster_names
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


class AlphaBeta(BaseModel):
    """t = alpha + n * beta for n bytes at the busiest GPU (paper, Sec. III-B and Fig. 9).

    Attributes:
        alpha_ms: start-up time.
        beta_ms_per_byte: time per byte.
        source: where the constants come from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha_ms: float = Field(ge=0)
    beta_ms_per_byte: float = Field(ge=0)
    source: str
    published: bool = True  # False: derived by a reading, marked wherever it is used


class Level(BaseModel):
    """One level of the hierarchy, outermost first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    groups: int = Field(ge=1)
    link_gb_per_s: float = Field(gt=0)  # one point-to-point transfer between two groups of this level, links idle
    inter: AlphaBeta | None = None  # among sibling groups of this level, equal lanes; not for the innermost level
    intra: AlphaBeta | None = None  # among all GPUs of one group of this level; not for the innermost level
    shaped_mbit_per_s: float | None = Field(default=None, gt=0, le=10_000)  # of a group's emulated link, each way


class Cluster(BaseModel):
    """Hierarchy and constants of a cluster; one file in conf/cluster/ each.

    Raises:
        ValueError: levels that do not divide, missing constants, negative alpha or beta.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str
    world: AlphaBeta
    levels: tuple[Level, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _levels_are_complete(self) -> "Cluster":
        hierarchy = self.hierarchy
        for level in self.levels[:-1]:
            if level.inter is None or level.intra is None:
                raise ValueError(f"level {level.name} needs alpha and beta of both inter and intra")
        if self.levels[-1].inter is not None or self.levels[-1].intra is not None:
            raise ValueError(f"innermost level {self.levels[-1].name}: its exchange is the intra of the level above")
        assert hierarchy.num_ranks >= 1
        for outer, inner in pairwise(self.levels):
            if inner.shaped_mbit_per_s is not None and outer.shaped_mbit_per_s is None:
                raise ValueError(f"level {inner.name} is shaped, but {outer.name} around it is not: shape outer levels")
        return self

    @property
    def hierarchy(self) -> Hierarchy:
        """U and the level names."""
        return Hierarchy(tuple(x.groups for x in self.levels), tuple(x.name for x in self.levels))

    @property
    def shaped_rates(self) -> tuple[float, ...]:
        """Mbit/s of a group's link, for every level whose links an emulated network shapes, outermost first."""
        return tuple(x.shaped_mbit_per_s for x in self.levels if x.shaped_mbit_per_s is not None)

    @property
    def exchanges(self) -> tuple[Peers, ...]:
        """All kinds of peers that a stage may have, each with constants of its own."""
        levels = range(1, self.hierarchy.depth)
        return (Peers("world"), *(Peers(kind, level) for level in levels for kind in ("inter", "intra")))

    def constants(self, peers: Peers) -> AlphaBeta:
        """Alpha and beta of a stage among these peers."""
        if peers.kind == "world":
            return self.world
        level = self.levels[peers.level - 1]
        constants = level.inter if peers.kind == "inter" else level.intra
        if constants is None:
            raise ValueError(f"cluster {self.name} has no constants for {peers}")
        return constants

    def reduced(self, num_ranks: int) -> "Cluster":
        """A smaller cluster of the same kind, for runs that place its ranks on one machine.

        From the outermost level on, the number of sub-groups is halved down to two until the GPUs match; if they are
        still too many, innermost levels go. Constants of the levels that stay are kept.

        Raises:
            ValueError: ``num_ranks`` cannot be reached so.
        """
        fan_outs = [level.groups // outer for level, outer in zip(self.levels, self.hierarchy.U, strict=False)]
        for i in range(len(fan_outs)):
            while math.prod(fan_outs) > num_ranks and fan_outs[i] > 2 and fan_outs[i] % 2 == 0:
                fan_outs[i] //= 2
        while math.prod(fan_outs) > num_ranks and len(fan_outs) > 1:
            fan_outs.pop()
        if math.prod(fan_outs) != num_ranks:
            raise ValueError(
                f"world_size={num_ranks}: cluster {self.name} has {self.hierarchy.num_ranks} GPUs in levels of "
                f"{list(self.hierarchy.groups)} groups and cannot be cut down to so many; name another cluster"
            )
        if num_ranks == self.hierarchy.num_ranks:
            return self
        groups = accumulate(fan_outs, operator.mul)
        levels = [level.model_copy(update={"groups": n}) for level, n in zip(self.levels, groups, strict=False)]
        levels[-1] = levels[-1].model_copy(update={"name": self.levels[-1].name, "inter": None, "intra": None})
        return self.model_copy(update={"name": f"{self.name}@{num_ranks}", "levels": tuple(levels)})

    @classmethod
    def named(cls, name: str) -> "Cluster":
        """The cluster of this name or file, as `cluster_file` finds it.

        Raises:
            ValueError: there is none, or it breaks a rule.
        """
        path = cluster_file(name)
        if path is None:
            raise ValueError(
                f"cluster={name} is unknown; choose from {', '.join(cluster_names())}, or name a .yaml file"
            )
        return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
