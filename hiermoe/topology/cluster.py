"""A cluster: its hierarchy and what an AlltoAll costs on each part of it."""

import math
import operator
from itertools import accumulate, pairwise
from typing import Any

from pydantic import Field, model_validator

from hiermoe.records.groups import read_named
from hiermoe.records.strict import Strict, is_valid
from hiermoe.topology.data_sheet import Port, derived
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import WORLD, AlphaBeta, Peers


class Level(Strict):
    """One level of the hierarchy, outermost first.

    Where ``port`` is given, the rate of one transfer is that of one port, and ``inter`` and ``intra`` may be left out:
    they are derived then (:mod:`hiermoe.topology.data_sheet`).

    Attributes:
        name: of one group.
        label: of several groups, in figures and tables.
        groups: that the level splits all GPUs into.
        link_gb_per_s: rate of one point-to-point transfer between two groups of this level, links idle.
        port: how traffic leaves a group of this level.
        inter: constants among sibling groups of this level, equal lanes; not for the innermost level.
        intra: constants among all GPUs of one group of this level; not for the innermost level.
        shaped_mbit_per_s: rate of a group's emulated link, each way; None where it is not shaped.
    """

    name: str
    label: str = ""
    groups: int = Field(ge=1)
    link_gb_per_s: float = Field(gt=0)
    port: Port | None = None
    inter: AlphaBeta | None = None
    intra: AlphaBeta | None = None
    shaped_mbit_per_s: float | None = Field(default=None, gt=0, le=10_000)

    @model_validator(mode="before")
    @classmethod
    def _what_is_left_out(cls, values: Any) -> Any:
        """A plural, and the rate of one port."""
        if not isinstance(values, dict):
            return values
        values = {"label": f"{values.get('name')}s", **values}
        if values.get("port") and "link_gb_per_s" not in values:
            known = is_valid(values["port"], Port)  # else the port's own errors say it
            values["link_gb_per_s"] = Port.model_validate(values["port"]).gb_per_s if known else 1.0
        return values


class OuterLevel(Strict):
    """A level that a larger cluster of the same kind has around these.

    Attributes:
        name: of one group.
        holds: groups of the next level inwards that one group has room for.
        port: how traffic leaves a group.
    """

    name: str
    holds: int = Field(ge=2)
    port: Port


class Cluster(Strict):
    """Hierarchy and constants of a cluster; one file in conf/cluster/ each.

    Attributes:
        name: also of its file.
        label: in figures and tables; the name where it is left out.
        entrant: whether it joins every sweep that compares clusters.
        description: one line.
        world: alpha and beta among all GPUs; derived where left out.
        levels: outermost first.
        beyond: levels around these in a larger cluster, outermost first; for :func:`hiermoe.topology.scaling.scaled`.
        overlap: where two stages of different chunks run at a time, the share of the shorter that passes beside the
            longer one: 1 where links are independent, 0 where all share one. None where it is not known.
        wave_ms: what it takes at least until chunks have each passed a stage, however few bytes they are. None where
            it was not measured: each chunk then starts up anew in every stage, by its alpha.

    Raises:
        ValueError: levels that do not divide, missing constants, negative alpha or beta.
    """

    name: str
    label: str = ""
    entrant: bool = False
    description: str
    world: AlphaBeta | None = None
    levels: tuple[Level, ...] = Field(min_length=1)
    beyond: tuple[OuterLevel, ...] = ()
    overlap: float | None = Field(default=None, ge=0, le=1)
    wave_ms: float | None = Field(default=None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _has_a_label(cls, values: Any) -> Any:
        return {"label": values.get("name"), **values} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _levels_are_complete(self) -> "Cluster":
        hierarchy = self.hierarchy
        assert hierarchy.num_ranks >= 1
        if self.levels[-1].inter is not None or self.levels[-1].intra is not None:
            raise ValueError(f"innermost level {self.levels[-1].name}: its exchange is the intra of the level above")
        if self._ports is None:
            for level in self.levels[:-1]:
                if level.inter is None or level.intra is None:
                    raise ValueError(
                        f"level {level.name} needs alpha and beta of both inter and intra, or all levels need a port"
                    )
            if self.world is None:
                raise ValueError("world needs alpha and beta, or all levels need a port")
            if self.beyond:
                raise ValueError("beyond is for clusters all of whose levels have a port")
        for number, level in enumerate(self.levels, start=1):
            if level.port is not None and hierarchy.lanes(number) % level.port.gpus:
                lanes = hierarchy.lanes(number)
                raise ValueError(f"level {level.name}: {level.port.gpus} GPUs share a port, a group has {lanes} GPUs")
        for outer, inner in pairwise(self.levels):
            if inner.shaped_mbit_per_s is not None and outer.shaped_mbit_per_s is None:
                raise ValueError(f"level {inner.name} is shaped, but {outer.name} around it is not: shape outer levels")
        return self

    @property
    def _ports(self) -> tuple[Port, ...] | None:
        """Of all levels; None where one has none."""
        ports = tuple(level.port for level in self.levels if level.port is not None)
        return ports if len(ports) == len(self.levels) else None

    @property
    def from_data_sheets(self) -> bool:
        """Whether some constant is derived from data sheets, and not published or calibrated."""
        return None in self._stated.values()

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
        return tuple(self._stated)

    def constants(self, peers: Peers) -> AlphaBeta:
        """Alpha and beta of a stage among these peers: as stated, else derived from the ports.

        Raises:
            ValueError: the cluster has no such peers.
        """
        stated = self._stated
        if peers not in stated:
            raise ValueError(f"cluster {self.name} has no constants for {peers}")
        if (constants := stated[peers]) is not None:
            return constants
        assert self._ports is not None
        return derived(peers, self.hierarchy, self._ports)

    def starts(self, chunks: int) -> int:
        """How often a stage counts its alpha; where a wave's least time is known, that counts instead."""
        return chunks if self.wave_ms is None else 1

    @property
    def _stated(self) -> dict[Peers, AlphaBeta | None]:
        """What the file says of every exchange."""
        stated = {WORLD: self.world}
        for number, level in enumerate(self.levels[:-1], start=1):
            stated |= {Peers("inter", number): level.inter, Peers("intra", number): level.intra}
        return stated

    def exchange_of(self, stage: str) -> Peers:
        """The peers of a stage, from its name in records: ``1:inter1``.

        Raises:
            KeyError: the cluster has no such peers.
        """
        return {str(peers): peers for peers in self.exchanges}[stage.rpartition(":")[2]]

    def reduced(self, num_ranks: int) -> "Cluster":
        """A miniature with all levels, for runs that place its ranks on one machine.

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
        """The cluster of this name, or of the file of this path.

        Raises:
            ValueError: there is none, or it breaks a rule.
        """
        return read_named("cluster", name, cls)
