"""Starts ranks on this machine, collects what they return, and ends all of them when one fails."""

import faulthandler
import io
import json
import os
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from hiermoe.dispatch.communicators import HOST_VARIABLE
from hiermoe.ranks.emulated.namespaces import enter
from hiermoe.ranks.gpus import meet, take_gpu
from hiermoe.ranks.memory import OWN_BYTES, check_memory, kills_for_memory
from hiermoe.ranks.own_folder import process_folder
from hiermoe.ranks.server import STOPPED, RankFailedError, RankLost, Watch, end_with_parent, fork_server, watched
from hiermoe.ranks.world import Device
from hiermoe.records.interrupts import held
from hiermoe.records.status import NotApplicable
from hiermoe.records.whole_file import naming, write_whole

# What gloo says in a rank whose peer has gone. This process hears of that peer from the fork server, after the rank may
# have ended too: at once, or late where the machine is busy.
_PEER_GONE = re.compile(r"onnection (closed|reset) by peer|Broken pipe|remote process exit")
_PATIENCE_SECONDS = 60.0
_TIMED_OUT = re.compile(r"[Tt]imed? ?out")
_FRAME = re.compile(r'File "(.+)", line (\d+) in (.+)')
_WHERE = signal.SIGUSR1  # has a rank write its stack
_MOMENT_SECONDS = 1.0
_JOIN_SECONDS = 30.0  # of processes that were killed
_NOBODY_KNOWS = 255  # exit code that multiprocessing makes up where the fork server did not live to tell it
_NO_ROOM = 74  # exit code of a rank that could not even write why it failed; EX_IOERR


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    args: tuple[Any, ...],
    timeout: timedelta,
    *,
    deadline: timedelta | None = None,
    hosts: Sequence[str] | None = None,
    namespaces: Sequence[Path] | None = None,
    device: Device = "cpu",
) -> list[Any]:
    """Run ``function(rank, *args)`` on new processes that form one group, one thread each.

    The processes come from a fork server that has imported torch and what `preload` names. It is started by the first
    call and ends with this process. No rank outlives this process, however that ends.

    Args:
        function: An importable function.
        world_size: Number of processes.
        args: Further arguments, sent to every process.
        timeout: How long a collective of the group may wait for the slowest rank.
        deadline: How long the whole run may take; None for any time.
        hosts: For each rank the name of the host that it plays, put into the rank's environment; None for none.
        namespaces: For each rank the network namespace that it lives in, with one interface besides loopback, which
            the ranks exchange over; None for this process's own.
        device: cpu: gloo; cuda: NCCL, the ranks taking this machine's GPUs in turn.

    Returns:
        What each rank returned, in rank order. Tensors are on the CPU.

    Raises:
        RankFailedError: A rank raised or died, or the deadline passed; all ranks have been ended.
        NotApplicable: A rank raised it.
        ValueError: ``hosts`` or ``namespaces`` does not name one a rank.
    """
    for name, given in (("hosts", hosts), ("namespaces", namespaces)):
        if given is not None and len(given) != world_size:
            raise ValueError(f"{name} names {len(given)} {name} for world_size={world_size} ranks")
    ends = None if deadline is None else time.monotonic() + deadline.total_seconds()
    check_memory(world_size, OWN_BYTES, "start fewer")
    context, killed_before = fork_server(), kills_for_memory()
    with tempfile.TemporaryDirectory(prefix="ranks-", dir=process_folder()) as name, watched() as watch:
        folder = Path(name)
        # Written once and not sent to each process, which would also share the memory of tensors among them.
        _save((function, args, dict(os.environ), world_size, timeout, hosts, namespaces, device), folder / "job.pt")
        # Daemons, because an interrupted parent would wait for any other child.
        ranks = [context.Process(target=_rank_main, args=(rank, folder), daemon=True) for rank in range(world_size)]
        started = _Started(ranks, folder, device, watch, killed_before)
        try:
            for process in ranks:
                with held():  # one that was made and is not told what to do would complain
                    process.start()
            watch.all_started()
            _wait(started, ends, deadline)
        finally:
            _end(ranks)
        return [torch.load(_result_path(folder, rank), weights_only=False) for rank in range(world_size)]


@dataclass(frozen=True)
class _Started:
    """Processes of ranks, where they leave what they did, and what is watched beside them."""

    ranks: Sequence[BaseProcess]
    folder: Path
    device: Device
    watch: Watch
    killed_before: int | None

    def succeeded(self, rank: int) -> bool:
        """Whether it left its result."""
        return self.ranks[rank].exitcode == 0 and _result_path(self.folder, rank).exists()

    def said(self, rank: int, what: re.Pattern[str]) -> bool:
        """Whether its report of a failure does."""
        path = _report_path(self.folder, rank)
        return path.exists() and what.search(path.read_text(encoding="utf-8")) is not None

    def aborted(self, rank: int) -> bool:
        """Whether it ended as NCCL ends a rank that waited longer than the timeout, or whose peer has gone."""
        return self.device == "cuda" and self.ranks[rank].exitcode == -signal.SIGABRT


def _wait(started: _Started, ends: float | None, deadline: timedelta | None) -> None:
    """Return once every rank has left its result.

    Raises:
        RankFailedError: a rank failed, or ``ends`` (on the monotonic clock) passed.
        NotApplicable: a rank raised it.
    """
    running: dict[Any, int] = {process.sentinel: rank for rank, process in enumerate(started.ranks)}
    while running:
        left = None if ends is None else max(0.0, ends - time.monotonic())
        ended = [running.pop(sentinel) for sentinel in connection.wait(list(running), left)]
        if not ended:
            names = ", ".join(str(rank) for rank in sorted(running.values()))
            raise RankFailedError(
                f"deadline of {deadline} passed before rank {names} of {len(started.ranks)} had finished"
            )
        if any(not started.succeeded(rank) for rank in ended):
            # One failure makes others fail. Wait for the one that no other rank's end explains.
            stop = time.monotonic() + _PATIENCE_SECONDS
            while running and (left := stop - time.monotonic()) > 0:
                if not all(started.succeeded(rank) or started.said(rank, _PEER_GONE) for rank in ended):
                    break
                ended.extend(running.pop(sentinel) for sentinel in connection.wait(list(running), left))
            late = _late(started, running, ended)
            raise _first_failure(started, ended, late)


def _late(started: _Started, running: dict[Any, int], ended: list[int]) -> str:
    """After a time-out: which ranks were in code of their own while others waited, and where; empty if none was.

    A rank that waits too is about to fail; it gets a moment, in which it joins those that have ended.
    """
    if not any(started.said(rank, _TIMED_OUT) or started.aborted(rank) for rank in ended):
        return ""
    stop = time.monotonic() + _MOMENT_SECONDS
    while running and (left := stop - time.monotonic()) > 0:
        ended.extend(running.pop(sentinel) for sentinel in connection.wait(list(running), left))
    for rank in running.values():
        with suppress(ProcessLookupError):
            os.kill(started.ranks[rank].pid or 0, _WHERE)
    time.sleep(_MOMENT_SECONDS if running else 0)
    places = {rank: _own_place(_stack_path(started.folder, rank)) for rank in sorted(running.values())}
    return ", ".join(
        f"rank {rank} of {len(started.ranks)} did not come: it was in {where}"
        for rank, where in places.items()
        if where
    )


def _own_place(stack: Path) -> str:
    """The innermost frame of a stack, as ``faulthandler`` writes it; empty where it waits for others or for its GPU."""
    frames = _FRAME.findall(stack.read_text(encoding="utf-8")) if stack.exists() else []
    if not frames or any("/torch/distributed/" in path or "/torch/cuda/" in path for path, _, _ in frames):
        return ""
    path, line, function = frames[0]
    return f"{function}, {path}:{line}"


def _first_failure(started: _Started, ended: list[int], late: str) -> Exception:
    """Says who failed first and why, the traceback below.

    A rank that was killed left no report and no time. Nobody but this process kills ranks, and that is after this, so
    such a rank is the cause and the errors of the others its consequence. An abort may be either.
    """
    ranks, folder = started.ranks, started.folder
    reports = []
    for rank in sorted(ended, key=lambda rank: (started.aborted(rank), rank)):
        if started.succeeded(rank):
            continue
        path = _report_path(folder, rank)
        if not path.exists():
            code = ranks[rank].exitcode or 0
            reason = f"died by signal {signal.Signals(-code).name}" if code < 0 else f"died by exit code {code}"
            if code == -signal.SIGKILL and kills_for_memory() != started.killed_before:
                reason = "was killed for memory by the kernel: start fewer ranks, or narrower ones"
            if ranks[rank].pid in started.watch.stopped:
                reason = STOPPED
            if late and started.aborted(rank):
                reason += f", as NCCL ends a rank that waits too long: {late}"
            if code == _NO_ROOM:
                reason = f"failed and could not write why to {folder}: is that disk full, or the folder gone?"
            kind = RankLost if code == _NOBODY_KNOWS else RankFailedError
            return kind(f"rank {rank} of {len(ranks)} {reason}")
        reports.append(json.loads(path.read_text(encoding="utf-8")) | {"rank": rank})
    first = min(reports, key=lambda report: report["monotonic_ns"])
    if late and _TIMED_OUT.search(first["cause"]):
        return RankFailedError(f"{late}; rank {first['rank']} waited: {first['cause']}\n{first['trace']}")
    if first["not_applicable"] is not None:
        return NotApplicable(first["not_applicable"])
    return RankFailedError(f"rank {first['rank']} of {len(ranks)} failed: {first['cause']}\n{first['trace']}")


def _end(ranks: Sequence[BaseProcess]) -> None:
    started = [process for process in ranks if process.pid is not None]
    for process in started:
        process.kill()
    for process in started:
        process.join(_JOIN_SECONDS)
        with suppress(ValueError):  # one that the kernel cannot end yet; it ends with its server
            process.close()


def _result_path(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}.pt"


def _stack_path(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}.txt"


def _save(content: object, path: Path) -> None:
    """As `torch.save` does, which on a full disk says much and not where."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        with naming(path):
            path.write_bytes(buffer.getbuffer())
    except OSError:
        path.unlink(missing_ok=True)  # what fills the disk leaves no room for the report
        raise


def _report_path(folder: Path, rank: int) -> Path:
    return folder / f"failure-{rank}.json"


def _rank_main(rank: int, folder: Path) -> None:
    """A rank's process, from the group's start to the result or the report of a failure."""
    end_with_parent()
    try:
        # For whoever waits for this rank: asks where it is.
        faulthandler.register(_WHERE, _stack_path(folder, rank).open("w"), all_threads=False)
        job = torch.load(folder / "job.pt", weights_only=False)
        function, args, environment, world_size, timeout, hosts, namespaces, device = job
        os.environ.update(environment)  # the fork server may be older than the caller's
        if hosts is not None:
            os.environ[HOST_VARIABLE] = hosts[rank]
        if namespaces is not None:
            enter(namespaces[rank])  # before anything opens a socket or starts a thread that may
            os.environ["GLOO_SOCKET_IFNAME"] = _interface(loopback=False)
        # All ranks are on this host. gloo otherwise asks the host's name for an address, which need not be reachable.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(loopback=True))
        if device == "cuda":
            take_gpu(rank, world_size, os.environ.get(HOST_VARIABLE, "localhost"))
        torch.set_num_threads(1)
        store = FileStore(str(folder / "rendezvous"), world_size)  # in a URL a blank would be another path
        store.set_timeout(timeout)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        meet(device)  # or one that has nothing to do would be gone before the last one has connected
        _save(function(rank, *args), _result_path(folder, rank))
    except BaseException as error:
        report = {
            "monotonic_ns": time.monotonic_ns(),
            "cause": "".join(traceback.format_exception_only(error)).strip().splitlines()[0],
            "trace": traceback.format_exc().strip(),
            "not_applicable": str(error) if isinstance(error, NotApplicable) else None,
        }
        with suppress(OSError):
            write_whole(_report_path(folder, rank), json.dumps(report).encode())
        # At once, without closing the group, so that the others fail too and do not wait.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if _report_path(folder, rank).exists() else _NO_ROOM)
    dist.destroy_process_group()


def _interface(loopback: bool) -> str:
    """The loopback interface, or the first other one."""
    for _, name in socket.if_nameindex():
        if name.startswith("lo") == loopback:
            return name
    raise RuntimeError("the ranks have no such network interface: set GLOO_SOCKET_IFNAME to one that they can use")
