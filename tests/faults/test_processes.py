"""Ranks, their server and the process that asked for them: each stopped, killed or late at any moment.

Whatever it is, the run ends soon with one line that names who was at fault, and no process and no file is left.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from hiermoe.ranks import server as ranks_server
from hiermoe.ranks.launch import run_ranks
from hiermoe.ranks.own_folder import process_folder
from hiermoe.ranks.server import RankFailedError, RankLost, ServerGone, fork_server, state_of, watched
from hiermoe.ranks.streams import RowStream
from hiermoe.ranks.workers import worker_pools
from hiermoe.records.project import CODE

SECONDS = 90.0  # within which every injection ends, on a machine however busy
SHORT, LONG = timedelta(seconds=8), timedelta(hours=1)  # of a collective
FOR_EVER = 3600.0
STOP, KILL = signal.SIGSTOP, signal.SIGKILL
MOMENTS = ("in its own code", "in a collective", "while it writes")
STOPPED = "was stopped by a signal for 5 s and has been ended"


def at(moment: str, rank: int, by: int, act: Callable[[], object], folder: Path) -> int:
    """A rank's function: rank ``by`` acts at a moment; the others wait for it."""
    with RowStream(folder, rank) as stream:
        stream.write([{"iteration": 0}])
        if rank == by and moment == "in a collective":
            threading.Timer(0.5, act).start()  # while it waits for the others
        elif rank == by:
            act()
        if moment == "while it writes":
            for iteration in range(1, 10**9 if rank == by else 2):
                stream.write([{"iteration": iteration}])
        if rank != by:
            time.sleep(1.0)
        dist.barrier()
        dist.barrier()
    return rank


def signal_self(rank: int, moment: str, victim: int, number: int, folder: Path) -> int:
    return at(moment, rank, victim, lambda: os.kill(os.getpid(), number), folder)


def signal_server(rank: int, moment: str, by: int, number: int, folder: Path) -> int:
    return at(moment, rank, by, lambda: os.kill(os.getppid(), number), folder)


def fail(rank: int, how: str, victim: int) -> None:
    if rank == victim:
        time.sleep(0.3)
        if how == "raises":
            raise ValueError("no room for token 7")
        if how == "exits":
            os._exit(3)
        time.sleep(FOR_EVER)
    dist.barrier()


def nothing(rank: int) -> int:
    return rank


@pytest.fixture(autouse=True)
def _quick_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that is made anew often needs no more than ranks do here."""
    monkeypatch.setattr(ranks_server, "_PRELOAD", ["hiermoe.ranks.in_server", "hiermoe.ranks.launch", __name__])
    yield


def server_pid() -> int | None:
    return forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]


def ended(run: Callable[[], object]) -> str:
    """How it ended, in one line; empty where it ended well. Checks that it did so in time and left nothing."""
    begun, said = time.monotonic(), ""
    try:
        run()
    except (RankFailedError, OSError) as error:
        said = str(error).splitlines()[0]
    assert time.monotonic() - begun < SECONDS
    stop = time.monotonic() + 10
    while left_over() and time.monotonic() < stop:  # the kernel ends ranks once all threads of their server have ended
        time.sleep(0.05)
    assert not left_over()
    assert not list(process_folder().glob("ranks-*"))
    return said


def left_over() -> list[psutil.Process]:
    server = server_pid()
    return [p for p in descendants(os.getpid()) if p.pid != server and "resource_tracker" not in command(p)]


def descendants(pid: int) -> list[psutil.Process]:
    return [p for p in psutil.Process(pid).children(recursive=True) if state_of(p.pid) not in ("", "Z", "X")]


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return "resource_tracker"  # it is gone


RANKS = [
    pytest.param(moment, number, victim, said, id=f"rank {victim} {name} {moment}")
    for moment in MOMENTS
    for number, name, said in ((STOP, "stopped", STOPPED), (KILL, "killed", "died by signal SIGKILL"))
    for victim in (0, 1)
]


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "number", "victim", "said"), RANKS)
def test_a_rank_that_is_stopped_or_killed_is_named(
    moment: str, number: int, victim: int, said: str, tmp_path: Path
) -> None:
    line = ended(lambda: run_ranks(signal_self, 2, (moment, victim, number, tmp_path), LONG))
    assert line == f"rank {victim} of 2 {said}"


SET_UP = [
    pytest.param(number, victim, said, id=f"rank {victim} {name} while it is set up")
    for number, name, said in ((STOP, "stopped", STOPPED), (KILL, "killed", "died by signal SIGKILL"))
    for victim in (0, 1)
]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "victim", "said"), SET_UP)
def test_a_rank_that_is_stopped_or_killed_before_it_has_met_the_others_is_named(
    number: int, victim: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    start = forkserver_process().start

    def start_and_signal(process: object) -> None:
        start(process)
        if len(started) == victim:
            os.kill(process.pid, number)  # type: ignore[attr-defined]
        started.append(1)

    monkeypatch.setattr(forkserver_process(), "start", start_and_signal)
    assert ended(lambda: run_ranks(nothing, 2, (), LONG)) == f"rank {victim} of 2 {said}"


def forkserver_process() -> type:
    return fork_server().Process


FAILING = [
    pytest.param(how, victim, said, id=f"rank {victim} {how}")
    for how, said in (
        ("raises", "rank {} of 2 failed: ValueError: no room for token 7"),
        ("exits", "rank {} of 2 died by exit code 3"),
        ("is late", "rank {} of 2 did not come: it was in fail, "),
    )
    for victim in (0, 1)
]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "victim", "said"), FAILING)
def test_a_rank_that_fails_or_does_not_come_is_named(how: str, victim: int, said: str) -> None:
    line = ended(lambda: run_ranks(fail, 2, (how, victim), SHORT if how == "is late" else LONG))
    assert line.startswith(said.format(victim))


GONE = r"the process that all ranks come from (pid {}) {}: try again"
SERVER = [
    pytest.param(moment, number, said, id=f"server {name} {moment}")
    for moment in MOMENTS
    for number, name, said in ((STOP, "stopped", STOPPED), (KILL, "killed", "was killed"))
]


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "number", "said"), SERVER)
def test_a_server_that_is_stopped_or_killed_under_its_ranks_is_named(
    moment: str, number: int, said: str, tmp_path: Path
) -> None:
    fork_server()
    pid = server_pid()
    assert ended(lambda: run_ranks(signal_server, 2, (moment, 1, number, tmp_path), LONG)) == GONE.format(pid, said)
    assert state_of(pid or 0) in ("", "Z")


@pytest.mark.slow
def test_a_server_whose_end_takes_a_moment_is_still_named() -> None:
    fork_server()
    pid = server_pid()
    assert pid is not None
    with pytest.raises(ServerGone, match=f"pid {pid}"), watched():
        threading.Timer(0.3, os.kill, (pid, KILL)).start()
        raise RankLost("rank 1 of 2 died by exit code 255")


BEFORE = [
    pytest.param(
        number, imported, said, id=f"server {name} {'before' if imported else 'as it begins,'} its ranks start"
    )
    for number, name, said in ((STOP, "stopped", STOPPED), (KILL, "killed", ""))
    for imported in (True, False)
]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "imported", "said"), BEFORE)
def test_a_server_that_is_stopped_before_its_ranks_start_is_named_and_one_that_is_killed_is_replaced(
    number: int, imported: bool, said: str
) -> None:
    if not imported and (old := server_pid()) is not None:
        os.kill(old, KILL)
        while state_of(old) not in ("", "Z"):
            time.sleep(0.01)
    fork_server()
    pid = server_pid()
    assert pid is not None
    if imported:
        run_ranks(nothing, 1, (), LONG)
    os.kill(pid, number)
    while number == KILL and state_of(pid) not in ("", "Z"):
        time.sleep(0.01)
    assert ended(lambda: run_ranks(nothing, 2, (), LONG)) == (said and GONE.format(pid, said))
    assert run_ranks(nothing, 2, (), LONG) == [0, 1]  # the next run has a server again


PARENT = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
from hiermoe.ranks.launch import run_ranks

def sleep(rank, folder):
    Path(folder, f"{rank}.new").write_text(f"[{os.getpid()}, {os.getppid()}]")
    Path(folder, f"{rank}.new").rename(Path(folder, f"{rank}.json"))
    time.sleep(3600)

if __name__ == "__main__":
    run_ranks(sleep, 2, (sys.argv[1],), timedelta(minutes=10))
"""
STOPPED_THEN = [
    pytest.param((), id="parent killed"),
    pytest.param(("0",), id="parent killed, a rank stopped"),
    pytest.param(("0", "1"), id="parent killed, all ranks stopped"),
    pytest.param(("server",), id="parent killed, the server stopped"),
    pytest.param(("server", "0", "1"), id="parent killed, the server and all ranks stopped"),
]


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Paths of sockets are short, so that a long TMPDIR would not be used."""
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        yield Path(name)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", STOPPED_THEN)
def test_nothing_outlives_the_process_that_asked_for_ranks_stopped_or_not(
    stopped: tuple[str, ...], tmp_path: Path, short_folder: Path
) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    scratch = short_folder
    environment = os.environ | {"PYTHONPATH": str(CODE), "TMPDIR": str(scratch)}
    parent = subprocess.Popen([sys.executable, script, tmp_path], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        reports = [tmp_path / f"{rank}.json" for rank in range(2)]
        wait_until(lambda: all(report.exists() for report in reports))
        pids = {str(rank): json.loads(report.read_text())[0] for rank, report in enumerate(reports)}
        pids["server"] = json.loads(reports[0].read_text())[1]
        for name in stopped:
            os.kill(pids[name], STOP)
        parent.kill()
        _, said = parent.communicate(timeout=SECONDS)
        wait_until(lambda: all(state_of(pid) in ("", "Z") for pid in pids.values()))
    finally:
        parent.kill()
        parent.wait()
    assert said == ""
    assert len([*scratch.glob("hiermoe-*")]) == 1  # nobody could remove it
    subprocess.run(
        [sys.executable, "-c", "from hiermoe.ranks.own_folder import process_folder; process_folder()"],
        env=environment,
        check=True,
        timeout=SECONDS,
    )
    assert not [*scratch.glob("*hiermoe-*")]  # the next start does


def wait_until(condition: Callable[[], bool]) -> None:
    stop = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < stop
        time.sleep(0.05)


SIMULATING = [
    pytest.param(STOP, "was stopped by a signal for 5 s", id="a simulating process stopped"),
    pytest.param(KILL, "was killed", id="a simulating process killed"),
]


def signalled(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "how"), SIMULATING)
def test_a_simulating_process_that_is_stopped_or_killed_is_named(number: int, how: str) -> None:
    begun = time.monotonic()
    with (
        pytest.raises(ValueError, match=f"a simulating process {how}.*; advice"),
        worker_pools(2, 1, "; advice") as pools,
    ):
        pools[1].submit(signalled, number).result()
    assert time.monotonic() - begun < SECONDS


COUNT = sum(map(len, (SIMULATING, RANKS, SET_UP, FAILING, SERVER, BEFORE, STOPPED_THEN)))


def test_the_page_on_reliability_counts_these() -> None:
    assert f"({COUNT} injections)" in (CODE / "docs" / "reliability.md").read_text()
