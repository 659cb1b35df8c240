"""The same fabric with another number of GPUs: the one way to say where an expert-parallel group lies in a cluster."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from operator import mul
from typing import NamedTuple

from hiermoe.topology.cluster import Cluster, Level, OuterLevel
from hiermoe.topology.data_sheet import Port
from hiermoe.topology.peers import AlphaBeta

UNLIMITED = 2**62


class _Kind(NamedTuple):
    """A level of a fabric of any size: one group's name and port, and how many of them a group outside has room for."""

    name: str
    port: Port
    room: int


def scaled(cluster: Cluster, num_ranks: int) -> Cluster:
    """A smaller or larger cluster of the same kind.

    GPUs fill one group after another from the innermost level on: a node, then more nodes, then further racks or pods,
    as the profile says how many groups each holds (``levels``, then ``beyond``); of the outermost level there may be
    any number. A level with a single group is left out. So this is also the part of a larger cluster that an
    expert-parallel group of consecutive GPUs occupies. Constants from data sheets are derived anew; published and
    calibrated ones stay what they are for the same peers; where fewer groups exchange than they hold for, beta is that
    of the smaller share that leaves a group, marked as a reading.

    Args:
        cluster: any, to be made smaller; larger only where all constants are from data sheets.
        num_ranks: GPUs.

    Returns:
        The cluster, named ``<name>@<num_ranks>``; the same one where it has so many GPUs already.

    Raises:
        ValueError: the cluster has constants that hold for its own size and is asked for more, or the GPUs do not fill
            whole groups; the message names numbers that do.
    """
    if num_ranks == cluster.hierarchy.num_ranks:
        return cluster
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks} must be at least 1")
    stated = cluster.world or any(level.inter or level.intra or level.port is None for level in cluster.levels)
    return _part(cluster, num_ranks) if stated else _grown(cluster, num_ranks)


def laid_out(cluster: Cluster, num_ranks: int, across: bool = False) -> Cluster:
    """What an expert-parallel group sees of a cluster.

    Args:
        cluster: any.
        num_ranks: GPUs of the group.
        across: whether they are spread over as many of the outermost groups as there are, as seldom anybody lays them
            out, instead of filling one group after another.

    Raises:
        ValueError: no such group lies in the cluster.
    """
    if not across:
        return scaled(cluster, num_ranks)
    return Cluster.model_validate(cluster.reduced(num_ranks).model_dump())  # a part of a node may not fill its port


def _grown(cluster: Cluster, num_ranks: int) -> Cluster:
    """Of any size: what the ports say of it."""
    kinds = _from_inside(cluster)
    used = list(zip(kinds, _filled(cluster, [kind.room for kind in kinds], num_ranks), strict=False))
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


def _part(cluster: Cluster, num_ranks: int) -> Cluster:
    """Of a cluster with constants of its own: the levels that so many GPUs reach into."""
    if num_ranks > cluster.hierarchy.num_ranks:
        raise ValueError(
            f"cluster {cluster.name} has constants of its own for {cluster.hierarchy.num_ranks} GPUs, which say "
            "nothing of larger numbers; only clusters from data sheets can be scaled up"
        )
    fan_outs = [fine // coarse for coarse, fine in pairwise(cluster.hierarchy.U)][::-1]
    filled = _filled(cluster, fan_outs, num_ranks)
    outside = cluster.hierarchy.depth - len(filled)  # levels that the GPUs have one group of
    groups = accumulate(reversed(filled), mul)
    levels = [level.model_copy(update={"groups": n}) for level, n in zip(cluster.levels[outside:], groups, strict=True)]
    world = cluster.levels[outside - 1].intra if outside else cluster.world
    room = fan_outs[len(filled) - 1]
    if filled[-1] < room:
        world = _for_fewer(world, filled[-1], room)
        levels[0] = levels[0].model_copy(update={"inter": _for_fewer(levels[0].inter, filled[-1], room)})
    changed = {"name": f"{cluster.name.partition('@')[0]}@{num_ranks}", "levels": tuple(levels), "world": world}
    return cluster.model_copy(update=changed)


def _for_fewer(constants: AlphaBeta | None, groups: int, of: int) -> AlphaBeta | None:
    """Constants that hold for more groups, read as those of some: beta by the share of n that leaves a GPU's group."""
    if constants is None:
        return None
    share = Fraction(of * (groups - 1), groups * (of - 1))
    changed = {"source": f"{constants.source}, beta x {share}", "published": False}
    return constants.times(1.0, float(share)).model_copy(update=changed)


def _filled(cluster: Cluster, rooms: Sequence[int], num_ranks: int) -> list[int]:
    """How many groups of each level, innermost first, go into one group outside, as far out as the GPUs reach.

    Raises:
        ValueError: the GPUs do not fill whole groups.
    """
    found = _fill(rooms, num_ranks)
    if found is None:
        smaller = next(n for n in range(num_ranks, 0, -1) if _fill(rooms, n))
        larger = next((n for n in range(num_ranks, 2 * num_ranks + 1) if _fill(rooms, n)), None)
        sizes = " or ".join(str(n) for n in (smaller, larger) if n is not None)
        raise ValueError(
            f"{num_ranks} GPUs do not fill whole groups of {cluster.name}, whose groups have room for "
            f"{', '.join(str(n) for n in rooms if n < UNLIMITED)} from the inside; take {sizes}"
        )
    return found


def _fill(rooms: Sequence[int], num_ranks: int) -> list[int] | None:
    found, left = [], num_ranks
    for room in rooms:
        if left == 1 and found:
            break
        if left > room and left % room:
            return None
        found.append(min(left, room))
        left //= found[-1]
    return found if left == 1 else None


def _from_inside(cluster: Cluster) -> list[_Kind]:
    """Every level there is, innermost first; all of them have a port."""
    kinds = [(outer.name, outer.port) for outer in cluster.beyond]
    kinds += [(level.name, level.port) for level in cluster.levels if level.port is not None]
    inside = [fine // coarse for coarse, fine in pairwise(cluster.hierarchy.groups)]
    room = [UNLIMITED, *(outer.holds for outer in cluster.beyond), *inside]
    return [_Kind(name, port, n) for (name, port), n in zip(kinds, room, strict=True)][::-1]
