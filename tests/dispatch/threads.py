"""Ranks that are threads: plans and exchanges of any hierarchy without processes, for many small random worlds."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hiermoe.dispatch import plan
from hiermoe.dispatch.communicators import Communicator
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import WORLD, Peers


class ThreadGroup:
    """Stands for a process group of threads."""

    def __init__(self, members: tuple[int, ...]) -> None:
        self.members = members
        self.barrier = threading.Barrier(len(members), timeout=600)
        self.posted: dict[int, Any] = {}

    def size(self) -> int:
        return len(self.members)

    def post(self, value: Any) -> list[Any]:
        """Every member's value, in order."""
        self.posted[_self.rank] = value
        self.barrier.wait()
        values = [self.posted[member] for member in self.members]
        self.barrier.wait()
        return values


_self = threading.local()


def _all_gather_into_tensor(output: Tensor, mine: Tensor, group: ThreadGroup) -> None:
    output.copy_(torch.cat(group.post(mine)).view_as(output))


def _all_to_all_single(
    output: Tensor, mine: Tensor, receive: list[int], send: list[int], group: ThreadGroup, async_op: bool
) -> Any:
    assert sum(receive) == len(output)
    position = group.members.index(_self.rank)
    parts = [theirs.split(splits)[position] for theirs, splits in group.post((mine, send))]
    assert [len(part) for part in parts] == receive, "sender and receiver do not agree"
    output.copy_(torch.cat(parts))
    return SimpleNamespace(wait=lambda: True) if async_op else None


class ThreadWorld:
    """The communicators of all ranks of a hierarchy."""

    def __init__(self, hierarchy: Hierarchy, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = SimpleNamespace(
            all_gather_into_tensor=_all_gather_into_tensor,
            all_to_all_single=_all_to_all_single,
            ProcessGroup=ThreadGroup,
        )
        monkeypatch.setattr(plan, "dist", fake)
        self._hierarchy = hierarchy
        self._groups: dict[tuple[int, ...], ThreadGroup] = {}
        kinds = [WORLD]
        for level in range(1, hierarchy.depth):
            kinds += [Peers("inter", level), Peers("intra", level)]
        for peers in kinds:
            for rank in range(hierarchy.num_ranks):
                members = peers.members(rank, hierarchy)
                self._groups.setdefault(members, ThreadGroup(members))

    def communicators(self, rank: int) -> Any:
        """In the place of `Communicators`."""

        def of(peers: Peers) -> Communicator:
            members = peers.members(rank, self._hierarchy)
            return Communicator(self._groups[members], members)  # type: ignore[arg-type]

        return SimpleNamespace(of=of, rank=rank, size=self._hierarchy.num_ranks, ep_group=of(WORLD).group)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """``function(rank)`` on all ranks at once."""

        def on_rank(rank: int) -> Any:
            _self.rank = rank
            try:
                return function(rank)
            except BaseException:
                for group in self._groups.values():
                    group.barrier.abort()
                raise

        with ThreadPoolExecutor(self._hierarchy.num_ranks) as pool:
            futures = [pool.submit(on_rank, rank) for rank in range(self._hierarchy.num_ranks)]
            errors = [error for future in futures if (error := future.exception()) is not None]
            first = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
            if errors:
                raise (first or errors)[0]
            return [future.result() for future in futures]
