"""A cluster's links on one machine: a tree of network namespaces that follows the hierarchy.

Every group of every shaped level is a namespace, and so is the core around the outermost level. A veth pair joins a
group to the one around it; a token bucket at both of its ends lets through what the level's link carries, each way. A
group with groups inside has a bridge. One without, a leaf, has an address and its ranks: what they send each other
stays on the leaf's own stack, everything else crosses shaped links. Nothing is made outside these namespaces.

To look at one while it lives: ``nsenter --net=/proc/<pid>/fd/<n> tc -s qdisc``, with a path of `EmulatedNetwork`.
"""

import errno
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Self

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from hiermoe.ranks.emulated.namespaces import Namespace
from hiermoe.ranks.emulated.requirements import CONTAINER_ADVICE, missing_requirement
from hiermoe.topology.cluster import Cluster

UPLINK = "up"  # a group's end of its link
_BRIDGE = "bridge"
_FIRST_ADDRESS = IPv4Address("10.0.0.1")
_PREFIX_LENGTH = 8

# As large frames as clusters have: headers take under 1 % of a link.
_FRAME_BYTES = 9000
# The stack hands frames of a connection on together, up to so many bytes; a bucket must hold them.
_BURST_OF_FRAMES_BYTES = 32 * 1024
# A bucket holds what its link carries in this time: enough for a timer that comes late on a busy core, little against
# the messages that are measured.
_BUCKET_SECONDS = 2e-3
# Nothing is ever dropped: connections limit what they have under way themselves, as on a network with flow control.
_QUEUE_BYTES = 2**30
# Buffers as large as messages (smallest, initial, largest, in bytes): a link must not wait until one of many ranks on
# few cores has its turn to fill or empty them, as a network card does not.
_TCP = {
    "tcp_congestion_control": "reno",
    "tcp_slow_start_after_idle": "0",
    "tcp_rmem": f"4096 {2**22} {2**24}",
    "tcp_wmem": f"4096 {2**22} {2**24}",
}


class EmulatedNetwork:
    """The links of a cluster, for as long as the context is entered.

    Example:
        >>> with EmulatedNetwork(Cluster.named("emulated_4x8")) as network:
        ...     run_ranks(function, 32, (), timeout, namespaces=network.namespace_of_rank)

    Attributes:
        leaves: a namespace for every group of the innermost shaped level.
    """

    def __init__(self, cluster: Cluster) -> None:
        """Check what can be checked; nothing is made before the context is entered.

        Args:
            cluster: one with shaped levels.

        Raises:
            ValueError: no level is shaped, or this machine lacks what is needed.
        """
        if not cluster.shaped_rates:
            raise ValueError(f"cluster {cluster.name} has no level with shaped_mbit_per_s; choose cluster=emulated_4x8")
        missing = missing_requirement()
        if missing is not None:
            raise ValueError(f"an emulated cluster cannot be set up here: {missing}")
        self._cluster = cluster
        self._namespaces: list[Namespace] = []
        self.leaves: list[Namespace] = []

    def __enter__(self) -> Self:
        try:
            self._fill(self._new_namespace(), level=0)
        except BaseException as error:
            self._close()
            reason = _reason(error)
            if reason is None:
                raise
            raise ValueError(f"an emulated cluster cannot be set up here: {reason}") from error
        return self

    def __exit__(self, *_exception: object) -> None:
        self._close()

    @property
    def namespace_of_rank(self) -> list[Path]:
        """Where each rank lives: the namespace of its leaf."""
        hierarchy = self._cluster.hierarchy
        lanes = hierarchy.lanes(len(self._cluster.shaped_rates))
        return [self.leaves[rank // lanes].path for rank in range(hierarchy.num_ranks)]

    def address(self, leaf: int) -> str:
        """Address of a leaf, known to the other leaves alone."""
        return str(_FIRST_ADDRESS + leaf)

    def _close(self) -> None:
        while self._namespaces:
            self._namespaces.pop().close()
        self.leaves = []

    def _new_namespace(self) -> Namespace:
        namespace = Namespace()
        self._namespaces.append(namespace)
        namespace.run(_tune_tcp)
        return namespace

    def _fill(self, group: Namespace, level: int) -> None:
        """Make everything inside a group of a level, whose own link is there (the core, level 0, has none)."""
        rates, U = self._cluster.shaped_rates, self._cluster.hierarchy.U
        if level == len(rates):
            address = self.address(len(self.leaves))
            self.leaves.append(group)
            group.run(partial(_make_leaf, address))
            return
        group.run(partial(_make_bridge, has_uplink=level > 0))
        for number in range(U[level + 1] // U[level]):
            inner = self._new_namespace()
            group.run(partial(_make_link, f"down{number}", inner, rates[level]))
            inner.run(partial(_shape, UPLINK, rates[level]))
            self._fill(inner, level + 1)


def _tune_tcp() -> None:
    """All links are shared by the same kind of connections, whatever this machine prefers."""
    for name, value in _TCP.items():
        Path("/proc/sys/net/ipv4", name).write_text(value)
    v6 = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
    if v6.exists():
        v6.write_text("1")


def _make_bridge(has_uplink: bool) -> None:
    """Join all links that a group has."""
    with IPRoute() as ip:
        ip.link("add", ifname=_BRIDGE, kind="bridge", mtu=_FRAME_BYTES)
        ip.link("set", index=_index(ip, _BRIDGE), state="up")
        if has_uplink:
            ip.link("set", index=_index(ip, UPLINK), master=_index(ip, _BRIDGE), state="up")


def _make_link(name: str, inner: Namespace, rate: float) -> None:
    """Make a link from this group's bridge to a group inside, and shape this end of it."""
    with IPRoute() as ip:
        peer = {"ifname": UPLINK, "net_ns_fd": inner.file, "mtu": _FRAME_BYTES}
        ip.link("add", ifname=name, kind="veth", mtu=_FRAME_BYTES, peer=peer)
        ip.link("set", index=_index(ip, name), master=_index(ip, _BRIDGE), state="up")
    _shape(name, rate)


def _shape(name: str, rate: float) -> None:
    """Let through so many Mbit/s from this end of a link."""
    bytes_per_s = round(rate * 1e6 / 8)
    burst = max(round(bytes_per_s * _BUCKET_SECONDS), _BURST_OF_FRAMES_BYTES + _FRAME_BYTES)
    with IPRoute() as ip:
        index = _index(ip, name)
        ip.link("set", index=index, gso_max_size=_BURST_OF_FRAMES_BYTES)
        ip.tc("add", kind="tbf", index=index, handle="1:", rate=bytes_per_s, burst=burst, limit=_QUEUE_BYTES)


def _make_leaf(address: str) -> None:
    """Give a leaf its address."""
    with IPRoute() as ip:
        ip.link("set", index=_index(ip, "lo"), state="up")
        ip.addr("add", index=_index(ip, UPLINK), address=address, prefixlen=_PREFIX_LENGTH)
        ip.link("set", index=_index(ip, UPLINK), state="up")


def _index(ip: Any, name: str) -> int:
    return ip.link_lookup(ifname=name)[0]


def _reason(error: BaseException) -> str | None:
    """What the kernel refused, in words; None where it was something else."""
    if isinstance(error, NetlinkError) and error.code in (errno.ENOENT, errno.EOPNOTSUPP):
        return "the kernel has no veth, bridge or sch_tbf: load them (modprobe -a veth bridge sch_tbf)"
    if isinstance(error, (OSError, NetlinkError)):
        return f"{error}; {CONTAINER_ADVICE}"
    return None
