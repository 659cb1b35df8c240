"""The processes of an allocation as one world: rank 0 runs the program, all others serve it one function after another.

torchrun or Slurm start every process with the same command line. `Crew.join` makes them one world of NCCL, or of gloo
where the CPU was asked for. Rank 0 goes on with the program and hands functions out by `Crew.run`; the others `serve`.

What ends well, and what does not. Bad input that every rank refuses leaves the crew as it was. Anything else on any
rank (another error, a collective that timed out, a rank that died) may have left others inside a collective, and the
groups unusable: then the whole job ends, with one message.
"""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, NoReturn, Self

import pandas as pd
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from hiermoe.ranks.allocation import Member
from hiermoe.ranks.gpus import meet, use_gpu
from hiermoe.ranks.streams import collect, streaming
from hiermoe.ranks.world import Device, Progress, no_progress
from hiermoe.records.keep import RunDied
from hiermoe.records.status import NotApplicable

# Followers wait in the control group while rank 0 draws routing or writes a report. That rank 0 is gone, they see at
# once; this is for the case that its machine vanished without a word.
_CONTROL_TIMEOUT = timedelta(hours=12)
# A rank that failed gives the others so long to fail too, before it takes them for being stuck in a collective.
_GRACE_SECONDS = 10.0
# Others may take so much longer than the timeout of a collective, to load what they were asked to work on.
_SLACK_SECONDS = 120.0
_LONGEST_MESSAGE = 300  # characters; gloo can talk
_FATAL = 3  # exit status of every rank of a crew that ended


class CrewEnded(Exception):
    """The ranks cannot go on together; this process must exit, and the launcher ends what is left."""


@dataclass(frozen=True)
class _Order:
    """What rank 0 asks for; ``function`` None: to go home."""

    number: int
    function: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    folder: Path = Path()


@dataclass(frozen=True)
class _Failure:
    """An error that leaves the crew as it was."""

    rank: int
    message: str
    not_applicable: bool


class Crew:
    """A world of the processes of an allocation; on rank 0 a context manager, whose end sends the others home.

    Attributes:
        rank: of this process.
        world_size: number of ranks.
        hosts: host of every rank.
        source: what records say of numbers that were measured here.
        device: of tensors, cpu or cuda.
        timeout: of a collective.
    """

    source: Literal["cluster"] = "cluster"

    def __init__(self, member: Member, store: Store, host: str, device: Device, timeout: timedelta) -> None:
        """Meet the others at a store that all share; `join` finds it. *Collective.*"""
        self.rank = member.rank
        self.world_size = member.world_size
        self.device: Device = device
        self.timeout = timeout
        self._store = PrefixStore("crew", store)
        self._number = 0
        self._in_order = False
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=PrefixStore("world", store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
        )
        meet(device)
        control = dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
        assert isinstance(control, dist.ProcessGroup)
        self._control = control
        self.hosts = [""] * self.world_size
        dist.all_gather_object(self.hosts, host, group=self._control)

    @classmethod
    def join(cls, device: Device, timeout: timedelta, folder: Path) -> "Crew":
        """Make all processes of the allocation one world. *Collective: every process must call it.*

        Args:
            device: cuda: NCCL, each rank on the GPU of its local rank; cpu: gloo.
            timeout: of a collective, and of finding each other.
            folder: shared by all hosts, for finding each other under Slurm.

        Raises:
            ValueError: this is no allocation, the others did not come, or there is no such GPU.
        """
        member = Member.from_environment()
        host = member.name_host()
        if device == "cuda":
            found = torch.cuda.device_count()
            # Slurm may show every task the one GPU that is its own. NCCL refuses two ranks on one GPU.
            index = 0 if found == 1 and member.under_slurm else member.local_rank
            if index >= found:
                raise ValueError(
                    f"local rank {member.local_rank} on {host} has no GPU: torch {torch.__version__} sees {found} "
                    "there; DEVICE=cpu asks for gloo instead"
                )
            use_gpu(index)
        torch.set_num_threads(1)
        try:
            return cls(member, member.meet(folder, timeout), host, device, timeout)
        except RuntimeError as error:
            raise ValueError(f"rank {member.rank} on {host} could not join the others: {_first_line(error)}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._in_order or isinstance(error, CrewEnded):
            return  # the others are in a collective or gone; that this process exits tells them
        self._send(_Order(self._number + 1))
        dist.destroy_process_group()

    def run(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        progress: Progress = no_progress,
        rows: Path | None = None,
    ) -> pd.DataFrame:
        """As every world does, on rank 0 only, which takes part as a rank.

        Raises:
            RunDied: ranks refused with a ValueError; has the rows of the iterations before.
            NotApplicable: a rank raised it.
            CrewEnded: the ranks cannot go on.
        """
        with streaming(rows, progress) as folder:
            self._number += 1
            order = _Order(self._number, function, args, folder)
            self._in_order = True
            self._send(order)
            failures = self._obey(order)
            self._in_order = False
            collected = collect(folder, self.world_size, finished=not failures)
        for failure in failures:
            if failure.not_applicable:
                raise NotApplicable(failure.message)
        if failures:
            raise RunDied(f"rank {failures[0].rank} of {self.world_size} failed: {failures[0].message}", collected)
        return collected

    def serve(self) -> None:
        """Do what rank 0 asks for until it is done. On all other ranks; does not return where the crew ended."""
        try:
            while (order := self._receive()).function is not None:
                self._obey(order)
        except CrewEnded as error:
            leave(error)
        dist.destroy_process_group()

    def _send(self, order: _Order) -> None:
        try:
            dist.broadcast_object_list([order], src=0, group=self._control)
        except RuntimeError as error:
            raise CrewEnded(f"a rank of {self.world_size} is gone: {_first_line(error)}") from error

    def _receive(self) -> _Order:
        box: list[Any] = [None]
        try:
            dist.broadcast_object_list(box, src=0, group=self._control)
        except RuntimeError as error:
            raise CrewEnded(f"rank {self.rank}: rank 0 is gone: {_first_line(error)}") from error
        return box[0]

    def _obey(self, order: _Order) -> list[_Failure]:
        """Run this rank's share, and find out how the others fared. *Collective.*

        Returns:
            Every rank's failure that leaves the crew as it was.
        """
        assert order.function is not None
        failure, fatal = None, ""
        try:
            order.function(self.rank, *order.args, order.folder)
        except (NotApplicable, ValueError) as error:
            failure = _Failure(self.rank, str(error), isinstance(error, NotApplicable))
        except Exception as error:
            fatal = f"rank {self.rank} of {self.world_size} failed: {_first_line(error)}"
            if not self._peers_complained(order):  # else this is what their failure does to a collective
                traceback.print_exc()
        try:
            self._wait_for_all(order, "" if failure is None else failure.message, fatal)
        except RuntimeError as error:  # the store is rank 0's
            raise CrewEnded(fatal or f"rank {self.rank}: rank 0 is gone: {_first_line(error)}") from error
        answers: list[_Failure | None] = [None] * self.world_size
        try:
            dist.all_gather_object(answers, failure, group=self._control)
        except RuntimeError as error:
            raise CrewEnded(f"a rank of {self.world_size} is gone: {_first_line(error)}") from error
        return [answer for answer in answers if answer is not None]

    def _peers_complained(self, order: _Order) -> bool:
        with contextlib.suppress(RuntimeError):
            return self._store.add(f"{order.number}/failed", 0) > 0
        return True

    def _wait_for_all(self, order: _Order, failure: str, fatal: str) -> None:
        """Return once every rank is through with the order and the crew is as it was.

        Raises:
            CrewEnded: a rank's error was fatal, or ranks are missing.
        """
        prefix = f"{order.number}/"
        if fatal or failure:
            message = fatal or f"rank {self.rank} of {self.world_size} failed: {failure}"
            if self._store.add(prefix + "failed", 1) == 1:
                self._store.set(prefix + "first", message)
        if fatal:
            self._store.add(prefix + "fatal", 1)
        self._store.set(f"{prefix}ended/{self.rank}", "")
        ended = self._store.add(prefix + "ended", 1)
        started, failed_at, pause = time.monotonic(), None, 0.005
        limit = self.timeout.total_seconds() + _SLACK_SECONDS
        grace = _GRACE_SECONDS + (self.rank == 0)  # the others can ask the store for as long as rank 0 is there
        while ended < self.world_size:
            now = time.monotonic()
            if failed_at is None and self._store.add(prefix + "failed", 0):
                failed_at = now
            if (failed_at is not None and now - failed_at > grace) or now - started > limit:
                missing = [r for r in range(self.world_size) if not self._store.check([f"{prefix}ended/{r}"])]
                names = ", ".join(map(str, missing))
                cause = self._first(prefix) if failed_at is not None else f"nothing from them for {limit:.0f} s"
                raise CrewEnded(f"{cause}; rank {names} of {self.world_size} is dead or waits in a collective")
            time.sleep(pause)
            pause = min(0.2, 2 * pause)
            ended = self._store.add(prefix + "ended", 0)
        if self._store.add(prefix + "fatal", 0):
            raise CrewEnded(self._first(prefix))
        # All the same error, or all none: otherwise some have begun a collective that the others never will.
        if 0 < self._store.add(prefix + "failed", 0) < self.world_size:
            raise CrewEnded(f"{self._first(prefix)}, and not all others with it")

    def _first(self, prefix: str) -> str:
        return self._store.get(prefix + "first").decode()


def leave(error: CrewEnded) -> NoReturn:
    """Say why the crew ended and exit at once: collectives that never end would keep an orderly exit waiting."""
    print(f"error: {error}; the job ends", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(_FATAL)


def _first_line(error: BaseException) -> str:
    line = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
    return shorten(line, _LONGEST_MESSAGE)
