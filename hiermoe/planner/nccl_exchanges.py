"""Which AlltoAll of a cluster a file of nccl-tests is of, and the constants that it gives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hiermoe.planner.fit_bends import CurveFit, fit_curve
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.data_sheet import crossing_share
from hiermoe.topology.nccl_tests import ALLTOALL, NcclTest, read_nccl_test
from hiermoe.topology.peers import WORLD, AlphaBeta, Peers


@dataclass(frozen=True)
class Exchanged:
    """What one AlltoAll of the cluster was measured to cost.

    Attributes:
        peers: who exchange.
        tests: the files.
        size_bytes: float [n], of all files.
        time_ms: float [n].
        fit: through them.
        constants: of the profile's number of groups.
    """

    peers: Peers
    tests: tuple[NcclTest, ...]
    size_bytes: np.ndarray
    time_ms: np.ndarray
    fit: CurveFit
    constants: AlphaBeta


def fit_exchanges_of(files: Sequence[tuple[str | None, Path]], cluster: Cluster) -> tuple[list[Exchanged], list[str]]:
    """Fit every AlltoAll that files of nccl-tests are of; and what is to be known of them.

    Where files have several numbers of nodes, those that come nearest to the cluster's count.

    Args:
        files: each with the name of its AlltoAll, None where its ranks say it.
        cluster: whose AlltoAlls they are.

    Raises:
        ValueError: a file cannot be read, or is of no AlltoAll of the cluster; or a curve cannot be fitted.
    """
    found: dict[Peers, dict[int, list[NcclTest]]] = {}
    notes = []
    for said, path in files:
        test = read_nccl_test(path)
        notes += [f"{path}: {note}" for note in test.notes]
        peers, size = exchange_of(test, cluster, said)
        found.setdefault(peers, {}).setdefault(size, []).append(test)
    exchanges = []
    for peers, by_size in found.items():
        wanted = peers.size(cluster.hierarchy)
        size = min(by_size, key=lambda one: abs(math.log(one / wanted)))
        notes += [f"{peers}: of {other} GPUs, left out for {size}" for other in by_size if other != size]
        exchanges.append(_fitted(peers, size, by_size[size], cluster))
    return sorted(exchanges, key=lambda one: cluster.exchanges.index(one.peers)), notes


def _fitted(peers: Peers, size: int, tests: Sequence[NcclTest], cluster: Cluster) -> Exchanged:
    size_bytes, time_ms = (
        np.concatenate([getattr(test, name) for test in tests]) for name in ("size_bytes", "time_ms")
    )
    source = f"{ALLTOALL} among {size} GPUs: {', '.join(test.path.name for test in tests)}"
    try:
        fit = fit_curve(size_bytes, time_ms, source)
    except ValueError as error:
        raise ValueError(f"{', '.join(str(test.path) for test in tests)}: {error}") from None
    constants, wanted = fit.constants, peers.size(cluster.hierarchy)
    if size != wanted:
        inside = peers.size_inside(1, cluster.hierarchy)
        share = crossing_share(peers, 1, cluster.hierarchy) / (1 - inside / size)
        source += f"; beta times {share:.3g}, the share of {wanted} GPUs' bytes that leaves a group over that of {size}"
        constants = constants.times(1, share).model_copy(update={"source": source})
    return Exchanged(peers, tuple(tests), size_bytes, time_ms, fit, constants)


def exchange_of(test: NcclTest, cluster: Cluster, said: str | None = None) -> tuple[Peers, int]:
    """Which AlltoAll of the cluster a file is of, by the ranks that it lists, and among how many GPUs.

    Ranks are laid out node by node, as everywhere. Of the outermost level there may be another number of groups.

    Args:
        test: the file.
        cluster: whose levels count.
        said: name of the AlltoAll; it must fit the ranks, if there are any.

    Raises:
        ValueError: it is none of them.
    """
    names = {str(peers): peers for peers in cluster.exchanges}
    if said is not None and said not in names:
        raise ValueError(f"from.{said}: {cluster.name} has no such AlltoAll; choose from {', '.join(names)}")
    if not test.group:
        if said is None:
            raise ValueError(
                f"{test.path} lists no ranks, so it does not say who exchanged; say it: 'from={{NAME:{test.path}}}', "
                f"NAME one of {', '.join(names)}"
            )
        return names[said], names[said].size(cluster.hierarchy)
    peers, size = _by_ranks(test, cluster)
    if said is not None and names[said] != peers:
        raise ValueError(f"{test.path} is of {peers} by its ranks, not of {said}")
    return peers, size


def _by_ranks(test: NcclTest, cluster: Cluster) -> tuple[Peers, int]:
    members, hierarchy = test.members, cluster.hierarchy
    lanes = [hierarchy.lanes(level) for level in range(hierarchy.depth + 1)]  # GPUs of a group of each level
    if len(members) < 2:
        raise ValueError(f"{test.path}: {len(members)} GPU exchanges with itself alone")
    _check_hosts(test, cluster, lanes)
    strides, size = set(np.diff(members).tolist()), len(members)
    sizes = {test.group.count(group) for group in set(test.group)}
    if len(strides) == 1 and len(sizes) == 1:
        (stride,) = strides
        if stride == 1 and size in lanes:
            return Peers("intra", lanes.index(size)), size
        if stride == 1 and size > lanes[1] and size % lanes[1] == 0:
            return WORLD, size
        for level in range(1, hierarchy.depth):
            if stride == lanes[level] and (level == 1 or size == lanes[level - 1] // stride):
                return Peers("inter", level), size
    raise ValueError(
        f"{test.path}: ranks {_few(members)} exchange, which is no AlltoAll of {cluster.name}, whose groups have "
        f"{', '.join(map(str, lanes))} GPUs"
    )


def _check_hosts(test: NcclTest, cluster: Cluster, lanes: Sequence[int]) -> None:
    """Ranks of a host must stand together, and be as many as a group of some level has."""
    changes = sum(a != b for a, b in zip(test.hosts, test.hosts[1:], strict=False))
    hosts = set(test.hosts)
    if changes + 1 != len(hosts):
        raise ValueError(f"{test.path}: ranks of a host do not follow one another; start them node by node")
    counts = {test.hosts.count(host) for host in hosts}
    if len(hosts) > 1 and not (len(counts) == 1 and counts <= set(lanes)):
        raise ValueError(
            f"{test.path}: hosts with {', '.join(map(str, sorted(counts)))} GPUs; groups of {cluster.name} have "
            f"{', '.join(map(str, lanes))}: name a cluster with such hosts"
        )


def _few(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
