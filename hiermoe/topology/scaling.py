"""The same fabric with another number of GPUs."""

from itertools import pairwise
from typing import NamedTuple

from hiermoe.topology.cluster import Cluster, Level, OuterLevel
from hiermoe.topology.data_sheet import Port

UNLIMITED = 2**62


class _Kind(NamedTuple):
    """A level of a fabric of any size: one group's name and port, and how many of them a group outside has room for."""

    name: str
    port: Port
    room: int


def scaled(cluster: Cluster, num_ranks: int) -> Cluster:
    """A smaller or larger cluster of the same kind, its constants derived anew.

    GPUs fill one group after another from the innermost level on: a node, then more nodes, then further racks or pods,
    as the profile says how many groups each holds (``levels``, then ``beyond``); of the outermost level there may be
    any number. A level with a single group is left out. So this is also the part of a larger cluster that an
    expert-parallel group of consecutive GPUs occupies.

    Args:
        cluster: all constants from data sheets.
        num_ranks: GPUs.

    Returns:
        The cluster, named ``<name>@<num_ranks>``; the same one where it has so many GPUs already.

    Raises:
        ValueError: the cluster has constants that hold for its own size alone, or the GPUs do not fill whole groups.
    """
    if num_ranks == cluster.hierarchy.num_ranks:
        return cluster
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks} must be at least 1")
    kinds = _from_inside(cluster)
    used: list[tuple[_Kind, int]] = []  # with the number of groups in one group outside
    left = num_ranks
    for kind in kinds:
        if left == 1 and used:
            break
        if left > kind.room and left % kind.room:
            raise ValueError(
                f"num_ranks={num_ranks} does not fill whole groups of {cluster.name}: {left} groups {kind.name} do not "
                f"go into groups of {kind.room}"
            )
        used.append((kind, min(left, kind.room)))
        left //= used[-1][1]
    levels, groups = [], 1
    for kind, fan_out in reversed(used):
        groups *= fan_out
        levels.append(Level(name=kind.name, groups=groups, link_gb_per_s=kind.port.gb_per_s, port=kind.port))
    beyond = [
        OuterLevel(name=outer.name, holds=inner.room, port=outer.port)
        for inner, outer in zip(kinds[len(used) - 1 :], kinds[len(used) :], strict=False)
    ]
    return Cluster(
        name=f"{cluster.name.partition('@')[0]}@{num_ranks}",
        label=cluster.label,
        description=cluster.description,
        levels=tuple(levels),
        beyond=tuple(reversed(beyond)),
    )


def _from_inside(cluster: Cluster) -> list[_Kind]:
    """Every level there is, innermost first."""
    kinds = [(outer.name, outer.port) for outer in cluster.beyond]
    for level in cluster.levels:
        if cluster.world or level.inter or level.intra or level.port is None:
            raise ValueError(
                f"cluster {cluster.name} has constants of its own for {cluster.hierarchy.num_ranks} GPUs, which say "
                "nothing of other numbers; only clusters from data sheets can be scaled"
            )
        kinds.append((level.name, level.port))
    inside = [fine // coarse for coarse, fine in pairwise(cluster.hierarchy.groups)]
    room = [UNLIMITED, *(outer.holds for outer in cluster.beyond), *inside]
    return [_Kind(name, port, n) for (name, port), n in zip(kinds, room, strict=True)][::-1]
