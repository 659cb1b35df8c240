"""Starts gloo ranks on this machine, collects what they return, and ends all of them when one fails."""

import json
import multiprocessing.util
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from hiermoe.dispatch.communicators import HOST_VARIABLE
from hiermoe.ranks.emulated.namespaces import enter
from hiermoe.ranks.memory import OWN_BYTES, check_memory, kills_for_memory
from hiermoe.records.status import NotApplicable

# What the fork server imports once, for all that comes from it: the caller's main module, and what `preload` adds.
_PRELOAD = ["__main__"]

# What gloo says in a rank whose peer has gone. This process hears of that peer from the fork server, after the rank may
# have ended too: at once, or late where the machine is busy.
_PEER_GONE = re.compile(r"onnection (closed|reset) by peer|Broken pipe")
_PATIENCE_SECONDS = 60.0
_LONGEST_TMPDIR = 60  # bytes; the paths of sockets below it have at most 107


class RankFailedError(RuntimeError):
    """A rank of a multi-process run failed; the message names it."""


def preload(module: str) -> None:
    """Have the fork server import a module too, so that no rank pays for it. To be called before the first rank starts.

    Safe to fork after must be: it starts no thread of its own and touches no device.
    """
    if module not in _PRELOAD:
        _PRELOAD.append(module)


def fork_server() -> ForkServerContext:
    """Where ranks and simulating workers come from. A process has one such server only, whoever starts it first."""
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TMPDIR:
        told, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            multiprocessing.util.get_temp_dir()  # made once, and used for all sockets
        finally:
            tempfile.tempdir = told
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    args: tuple[Any, ...],
    timeout: timedelta,
    *,
    deadline: timedelta | None = None,
    hosts: Sequence[str] | None = None,
    namespaces: Sequence[Path] | None = None,
) -> list[Any]:
    """Run ``function(rank, *args)`` on new processes that form one gloo group, one thread each.

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
    with tempfile.TemporaryDirectory(prefix="hiermoe-ranks-") as name:
        folder = Path(name)
        # Written once and not sent to each process, which would also share the memory of tensors among them.
        torch.save((function, args, dict(os.environ), world_size, timeout, hosts, namespaces), folder / "job.pt")
        # Daemons, because an interrupted parent would wait for any other child.
        ranks = [context.Process(target=_rank_main, args=(rank, folder), daemon=True) for rank in range(world_size)]
        try:
            for process in ranks:
                process.start()
            _wait(ranks, folder, ends, deadline, killed_before)
        finally:
            _end(ranks)
        return [torch.load(_result_path(folder, rank), weights_only=False) for rank in range(world_size)]


def end_with_parent() -> None:
    """Make sure that this process does not outlive the one that started it, however that ends."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _wait(
    ranks: Sequence[BaseProcess],
    folder: Path,
    ends: float | None,
    deadline: timedelta | None,
    killed_before: int | None,
) -> None:
    """Return once every rank has left its result.

    Raises:
        RankFailedError: a rank failed, or ``ends`` (on the monotonic clock) passed.
        NotApplicable: a rank raised it.
    """
    running: dict[Any, int] = {process.sentinel: rank for rank, process in enumerate(ranks)}
    while running:
        left = None if ends is None else max(0.0, ends - time.monotonic())
        ended = [running.pop(sentinel) for sentinel in connection.wait(list(running), left)]
        if not ended:
            names = ", ".join(str(rank) for rank in sorted(running.values()))
            raise RankFailedError(f"deadline of {deadline} passed before rank {names} of {len(ranks)} had finished")
        if any(not _succeeded(ranks[rank], folder, rank) for rank in ended):
            # One failure makes others fail. Wait for the one that no other rank's end explains.
            stop = time.monotonic() + _PATIENCE_SECONDS
            while running and (left := stop - time.monotonic()) > 0:
                if not all(_succeeded(ranks[rank], folder, rank) or _saw_a_peer_go(folder, rank) for rank in ended):
                    break
                ended.extend(running.pop(sentinel) for sentinel in connection.wait(list(running), left))
            raise _first_failure(ranks, folder, ended, killed_before)


def _succeeded(process: BaseProcess, folder: Path, rank: int) -> bool:
    return process.exitcode == 0 and _result_path(folder, rank).exists()


def _saw_a_peer_go(folder: Path, rank: int) -> bool:
    path = _report_path(folder, rank)
    return path.exists() and _PEER_GONE.search(path.read_text(encoding="utf-8")) is not None


def _first_failure(
    ranks: Sequence[BaseProcess], folder: Path, ended: list[int], killed_before: int | None
) -> Exception:
    """Says who failed first and why, the traceback below.

    A rank that was killed left no report and no time. Nobody but this process kills ranks, and that is after this, so
    such a rank is the cause and the errors of the others its consequence.
    """
    reports = []
    for rank in sorted(ended):
        if _succeeded(ranks[rank], folder, rank):
            continue
        path = _report_path(folder, rank)
        if not path.exists():
            code = ranks[rank].exitcode or 0
            reason = f"died by signal {signal.Signals(-code).name}" if code < 0 else f"died by exit code {code}"
            if code == -signal.SIGKILL and kills_for_memory() != killed_before:
                reason = "was killed for memory by the kernel: start fewer ranks, or narrower ones"
            return RankFailedError(f"rank {rank} of {len(ranks)} {reason}")
        reports.append(json.loads(path.read_text(encoding="utf-8")) | {"rank": rank})
    first = min(reports, key=lambda report: report["monotonic_ns"])
    if first["not_applicable"] is not None:
        return NotApplicable(first["not_applicable"])
    return RankFailedError(f"rank {first['rank']} of {len(ranks)} failed: {first['cause']}\n{first['trace']}")


def _end(ranks: Sequence[BaseProcess]) -> None:
    started = [process for process in ranks if process.pid is not None]
    for process in started:
        process.kill()
    for process in started:
        process.join()
        process.close()


def _result_path(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}.pt"


def _report_path(folder: Path, rank: int) -> Path:
    return folder / f"failure-{rank}.json"


def _rank_main(rank: int, folder: Path) -> None:
    """A rank's process, from the group's start to the result or the report of a failure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    end_with_parent()
    try:
        job = torch.load(folder / "job.pt", weights_only=False)
        function, args, environment, world_size, timeout, hosts, namespaces = job
        os.environ.update(environment)  # the fork server may be older than the caller's
        if hosts is not None:
            os.environ[HOST_VARIABLE] = hosts[rank]
        if namespaces is not None:
            enter(namespaces[rank])  # before anything opens a socket or starts a thread that may
            os.environ["GLOO_SOCKET_IFNAME"] = _interface(loopback=False)
        # All ranks are on this host. gloo otherwise asks the host's name for an address, which need not be reachable.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(loopback=True))
        torch.set_num_threads(1)
        store = FileStore(str(folder / "rendezvous"), world_size)  # in a URL a blank would be another path
        store.set_timeout(timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        dist.barrier()  # or one that has nothing to do would be gone before the last one has connected
        torch.save(function(rank, *args), _result_path(folder, rank))
    except BaseException as error:
        report = {
            "monotonic_ns": time.monotonic_ns(),
            "cause": "".join(traceback.format_exception_only(error)).strip().splitlines()[0],
            "trace": traceback.format_exc().strip(),
            "not_applicable": str(error) if isinstance(error, NotApplicable) else None,
        }
        _report_path(folder, rank).write_text(json.dumps(report), encoding="utf-8")
        # At once, without closing the group, so that the others fail too and do not wait.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()


def _interface(loopback: bool) -> str:
    """The loopback interface, or the first other one."""
    for _, name in socket.if_nameindex():
        if name.startswith("lo") == loopback:
            return name
    raise RuntimeError("the ranks have no such network interface: set GLOO_SOCKET_IFNAME to one that they can use")
