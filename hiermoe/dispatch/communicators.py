"""The process groups that the stages of a scheme exchange in, and the check that ranks sit where the hierarchy says."""

import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor

from hiermoe.planner.scheme import DispatchScheme
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import WORLD, Peers

HOST_VARIABLE = "HIERMOE_HOST"
"""Environment variable of a rank: the name of the host that it plays."""


@dataclass(frozen=True)
class Communicator:
    """One rank's view of the peers of a stage.

    Attributes:
        group: process group.
        members: ranks of the expert-parallel group that exchange, ascending.
    """

    group: dist.ProcessGroup
    members: tuple[int, ...]


class Communicators:
    """The communicators of one rank for every kind of peers that some schemes need."""

    def __init__(
        self,
        ep_group: dist.ProcessGroup,
        hierarchy: Hierarchy,
        schemes: Iterable[DispatchScheme],
        timeout: timedelta | None = None,
    ) -> None:
        """Check the ranks' hosts and make the process groups.

        *Collective: every rank of every expert-parallel group must call it.*

        Args:
            ep_group: expert-parallel group; its rank g is the hierarchy's GPU g.
            hierarchy: groups of GPUs.
            schemes: whose stages need communicators.
            timeout: of a collective; None for torch's default.

        Raises:
            ValueError: the group and the hierarchy differ in size, or a host name contradicts the hierarchy.
        """
        self.ep_group = ep_group
        self.hierarchy = hierarchy
        self.rank = dist.get_rank(ep_group)
        self.size = dist.get_world_size(ep_group)
        if self.size != hierarchy.num_ranks:
            raise ValueError(
                f"ep_size={self.size}, but the cluster's hierarchy has {hierarchy.num_ranks} GPUs "
                f"({list(hierarchy.groups)} groups)"
            )
        hosts: list[str] = [""] * self.size
        dist.all_gather_object(hosts, os.environ.get(HOST_VARIABLE) or socket.gethostname(), group=ep_group)
        check_hosts(hosts, hierarchy)
        self._timeout = timeout
        self._by_peers = {WORLD: Communicator(ep_group, tuple(range(self.size)))}
        for scheme in schemes:
            for stage in scheme.stages:
                if stage.peers not in self._by_peers:
                    self._by_peers[stage.peers] = self._make(stage.peers)

    def of(self, peers: Peers) -> Communicator:
        """The communicator for these peers.

        Raises:
            KeyError: no scheme that was announced has such a stage.
        """
        return self._by_peers[peers]

    def _make(self, peers: Peers) -> Communicator:
        members = peers.members(self.rank, self.hierarchy)
        global_ranks = [dist.get_global_rank(self.ep_group, member) for member in members]
        if global_ranks != sorted(global_ranks):
            raise ValueError(f"ranks {global_ranks} of the expert-parallel group are not in ascending order")
        same = [known for known in self._by_peers.values() if known.members == members]
        if same:
            return same[0]
        return Communicator(group_of(tuple(global_ranks), self._timeout), members)


# Of every world the groups that were made in it. Ranks that run many systems one after another would otherwise make the
# same groups for each, and NCCL and gloo keep what a group takes for as long as the process lives.
_GROUPS: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Any, ...], dist.ProcessGroup]] = WeakKeyDictionary()


def group_of(global_ranks: tuple[int, ...], timeout: timedelta | None, purpose: str = "") -> dist.ProcessGroup:
    """The group of these ranks, made when it is first asked for. *Collective: each of these ranks must call it.*

    Args:
        global_ranks: its ranks, ascending.
        timeout: of a collective; None for torch's default.
        purpose: for another one has a group of its own.
    """
    world = dist.group.WORLD
    assert world is not None
    made = _GROUPS.setdefault(world, {})
    key = (global_ranks, timeout, purpose)
    if key not in made:
        group = dist.new_group(list(global_ranks), timeout=timeout, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        dist.barrier(group)  # NCCL wants all of them in its first operation, and messages are between two
        made[key] = group
    return made[key]


def played_hosts(hierarchy: Hierarchy) -> list[str]:
    """A host name for every rank, for one machine that plays all nodes of the hierarchy."""
    return [f"node{rank // _lanes_of_node(hierarchy)}" for rank in range(hierarchy.num_ranks)]


def _lanes_of_node(hierarchy: Hierarchy) -> int:
    """GPUs of a node: of the level that is named so; without one, all of them."""
    return hierarchy.lanes(hierarchy.names.index("node") + 1 if "node" in hierarchy.names else 0)


def check_hosts(hosts: Sequence[str], hierarchy: Hierarchy) -> None:
    """Two ranks must share a host exactly where the hierarchy puts them into one node.

    The level named ``node`` tells; a hierarchy without it is one node.

    Args:
        hosts: host name of every rank.
        hierarchy: groups of GPUs.

    Raises:
        ValueError: the first rank that contradicts.
    """
    lanes = _lanes_of_node(hierarchy)
    host_of_node: dict[int, str] = {}
    for rank, host in enumerate(hosts):
        node = rank // lanes
        expected = host_of_node.setdefault(node, host)
        if host != expected:
            raise ValueError(
                f"rank {rank} runs on host {host}, but the hierarchy puts it into node {node} with rank {node * lanes} "
                f"on host {expected}: order the ranks by host, {lanes} a host"
            )
        other = next((n for n, h in host_of_node.items() if h == host and n != node), None)
        if other is not None:
            raise ValueError(
                f"rank {rank} runs on host {host} like rank {other * lanes}, but the hierarchy has them on different "
                f"nodes of {lanes} ranks each; where one machine plays several nodes, set {HOST_VARIABLE}"
            )


def reduced(tensor: Tensor, operation: Any, group: dist.ProcessGroup | None = None) -> Tensor:
    """A reduction over ranks of what each has on its CPU: a new tensor, there too. *Collective.*

    Args:
        tensor: of this rank.
        operation: of `torch.distributed.ReduceOp`.
        group: process group; None for the world. One of NCCL takes tensors on GPUs alone.
    """
    result = tensor.to("cuda" if dist.get_backend(group) == "nccl" else "cpu", copy=True)
    dist.all_reduce(result, operation, group=group)
    return result.cpu()
