"""The fork server that ranks and simulating workers come from, and a watch over both."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, get_context, parent_process
from multiprocessing.context import ForkServerContext
from pathlib import Path

from hiermoe.ranks.own_folder import process_folder
from hiermoe.records.interrupts import ENDING

# What the fork server imports once, for all that comes from it: the caller's main module, and what `preload` adds.
_PRELOAD = ["hiermoe.ranks.in_server", "__main__"]
START_SECONDS = 300.0  # for the server to import all that and to make a process, on a busy machine
STOPPED_SECONDS = 5.0  # after which one that is stopped is not taken for one that goes on in a moment
STOPPED = f"was stopped by a signal for {STOPPED_SECONDS:.0f} s and has been ended"
_LOOK_SECONDS = 0.25
_ENDED = ("", "Z", "X")


class RankFailedError(RuntimeError):
    """A rank of a multi-process run failed; the message names it."""


class RankLost(RankFailedError):
    """A rank ended, and by its exit code alone the fork server may have."""


class ServerGone(RankFailedError, OSError):
    """The fork server ended; the message says why."""


def preload(module: str) -> None:
    """Have the fork server import a module too, so that no rank pays for it. To be called before the first rank starts.

    Safe to fork after must be: it starts no thread of its own and touches no device.
    """
    if module not in _PRELOAD:
        _PRELOAD.append(module)


def fork_server() -> ForkServerContext:
    """Where ranks and simulating workers come from. A process has one such server only, whoever starts it first.

    On Linux the kernel ends it with the thread that starts it, and with it all that came from it.
    """
    # Where its sockets are; multiprocessing would make a folder that stays behind if this process is killed.
    multiprocessing.current_process()._config.setdefault("tempdir", str(process_folder()))  # type: ignore[attr-defined]
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until it has imported what handles them
    told = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(process_folder())  # what it imports leaves files, which it is killed with
    try:
        forkserver.ensure_running()
        stop = time.monotonic() + STOPPED_SECONDS
        while state_of(_server_pid()) in _ENDED and time.monotonic() < stop:  # it ends, but not all its threads have
            time.sleep(_LOOK_SECONDS / 10)
            forkserver.ensure_running()
    finally:
        os.environ.pop("TMPDIR") if told is None else os.environ.update(TMPDIR=told)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return context


def end_with_parent() -> None:
    """Make sure that this process does not outlive the one that asked for it, where the kernel does not see to that."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Watch:
    """Over the fork server and what came from it: ends what was stopped for too long, and a server that makes nothing.

    Looks are counted and not seconds: while this process is stopped itself, as all are by a terminal, none counts.

    Attributes:
        pids: of processes that came from the server.
        stopped: those of them that were stopped for too long, and have been ended.
        problem: why the server was ended; empty where it was not.
    """

    def __init__(self) -> None:
        """Begin to watch."""
        self.pids: list[int] = []
        self.stopped: list[int] = []
        self.problem = ""
        self._starts = time.monotonic()  # 0 once all have started
        self._done = threading.Event()
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._follower.start()

    @property
    def server(self) -> int:
        """The present server; multiprocessing starts another one where it finds it dead."""
        return _server_pid()

    def all_started(self) -> None:
        """No further process is waited for, and those that are there are watched too."""
        self.pids = [process.pid for process in multiprocessing.active_children() if process.pid is not None]
        self._starts = 0.0

    def end(self) -> None:
        """Watch no longer."""
        self._done.set()
        self._follower.join()

    def _follow(self) -> None:
        looks: dict[int, int] = {}
        while not self._done.wait(_LOOK_SECONDS):
            looks = {pid: looks.get(pid, 0) + 1 for pid in (self.server, *self.pids) if state_of(pid) == "T"}
            for pid in (pid for pid, count in looks.items() if count * _LOOK_SECONDS >= STOPPED_SECONDS):
                if pid == self.server:
                    self._end_server(STOPPED)
                elif pid not in self.stopped:
                    self.stopped.append(pid)
                    _kill(pid)
            if self._starts and time.monotonic() - self._starts > START_SECONDS:
                self._end_server(f"did not start all of them in {START_SECONDS:.0f} s")

    def _end_server(self, why: str) -> None:
        self.problem = self.problem or why
        _kill(self.server)


@contextmanager
def watched() -> Iterator[Watch]:
    """Watch the fork server for as long as this context is entered.

    Raises:
        ServerGone: it has ended, which errors in this context are the consequence of.
    """
    watch = Watch()
    try:
        yield watch
    except Exception as error:
        if isinstance(error, EOFError | ConnectionError | RankLost):  # it is seen to end before it has
            _wait_for_end(watch.server)
        if state_of(watch.server) in _ENDED:
            why = watch.problem or "was killed"
            raise ServerGone(f"the process that all ranks come from (pid {watch.server}) {why}: try again") from error
        raise
    finally:
        watch.end()


def state_of(pid: int) -> str:
    """The state of a process: a letter, as in ``man 5 proc``; empty where there is none, ``?`` where nobody says."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "" if Path("/proc/self/stat").exists() else "?"


def _server_pid() -> int:
    return forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]


def _wait_for_end(pid: int) -> None:
    stop = time.monotonic() + 1.0
    while state_of(pid) not in _ENDED and time.monotonic() < stop:
        time.sleep(0.01)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
