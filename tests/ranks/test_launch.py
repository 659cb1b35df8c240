"""Ranks give back what they computed; the first that fails ends the run and is named; none outlives its parent."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from hiermoe.dispatch.communicators import HOST_VARIABLE
from hiermoe.ranks.launch import run_ranks
from hiermoe.ranks.server import RankFailedError
from hiermoe.records.status import NotApplicable

TIMEOUT = timedelta(hours=1)  # no test lasts so long, so what ends did not wait for it
FOR_EVER = 3600.0  # seconds, the same


def sum_of_ranks(rank: int) -> torch.Tensor:
    total = torch.tensor([rank + 1, rank])
    dist.all_reduce(total)
    return total[: rank + 1]


def environment_of_rank(rank: int, variable: str) -> tuple[str | None, str | None, int]:
    return os.environ.get(HOST_VARIABLE), os.environ.get(variable), torch.get_num_threads()


def fail_on_rank_one(rank: int, how: str) -> None:
    if rank == 1:
        time.sleep(0.2)  # the others wait in the collective by now
        if how == "raise":
            raise ValueError("no room for token 7\nand more")
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def stall_on_rank_one(rank: int, folder: Path) -> None:
    (folder / str(rank)).touch()
    if rank == 1:
        time.sleep(FOR_EVER)
    dist.barrier()


def result_of_rank_zero_alone(rank: int) -> object:
    return rank if rank == 0 else (lambda: rank)  # the latter cannot be pickled


def test_ranks_form_one_group_and_return_in_rank_order() -> None:
    results = run_ranks(sum_of_ranks, 3, (), TIMEOUT)
    assert [result.tolist() for result in results] == [[6], [6, 3], [6, 3]]


def test_ranks_see_their_host_and_the_callers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET_AFTER_THE_FORK_SERVER", "yes")
    seen = run_ranks(environment_of_rank, 2, ("SET_AFTER_THE_FORK_SERVER",), TIMEOUT, hosts=["a", "b"])
    assert seen == [("a", "yes", 1), ("b", "yes", 1)]
    assert run_ranks(environment_of_rank, 1, ("NEVER_SET",), TIMEOUT) == [(None, None, 1)]


def test_hosts_must_name_one_host_a_rank() -> None:
    with pytest.raises(ValueError, match="hosts names 1 hosts for world_size=2 ranks"):
        run_ranks(environment_of_rank, 2, ("X",), TIMEOUT, hosts=["a"])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "rank 1 of 3 failed: ValueError: no room for token 7"),
        ("exit", "rank 1 of 3 died by exit code 3"),
        ("kill", "rank 1 of 3 died by signal SIGKILL"),
    ],
)
def test_a_rank_that_fails_ends_the_others_in_their_collective_and_is_named(how: str, message: str) -> None:
    with pytest.raises(RankFailedError) as caught:
        run_ranks(fail_on_rank_one, 3, (how,), TIMEOUT)
    assert str(caught.value).splitlines()[0] == message
    assert not ranks_of(os.getpid())


def not_applicable_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise NotApplicable("needs four levels")
    dist.barrier()


def test_a_run_without_meaning_is_no_failure() -> None:
    with pytest.raises(NotApplicable, match=r"^needs four levels$"):
        run_ranks(not_applicable_on_rank_one, 2, (), TIMEOUT)


def test_a_result_that_cannot_be_sent_is_the_ranks_failure() -> None:
    with pytest.raises(RankFailedError, match=r"rank 1 of 2 failed: .*pickle"):
        run_ranks(result_of_rank_zero_alone, 2, (), TIMEOUT)


def test_a_collective_waits_no_longer_than_the_timeout(tmp_path: Path) -> None:
    for seconds in (1, 4, 16, 64):  # on a busy machine the ranks may not even find each other in this time
        folder = tmp_path / str(seconds)
        folder.mkdir()
        with pytest.raises(RankFailedError) as caught:
            run_ranks(stall_on_rank_one, 2, (folder,), timedelta(seconds=seconds))
        if len(list(folder.iterdir())) == 2:
            break
    late = (
        r"rank 1 of 2 did not come: it was in stall_on_rank_one, .*test_launch\.py:\d+; rank 0 waited: RuntimeError: "
    )
    assert re.match(late + ".*[Tt]imed out", str(caught.value))


def test_a_run_takes_no_longer_than_its_deadline(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="deadline of 0:00:02 passed before rank 0, 1 of 2 had finished"):
        run_ranks(stall_on_rank_one, 2, (tmp_path,), TIMEOUT, deadline=timedelta(seconds=2))
    assert not ranks_of(os.getpid())


PARENT = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from hiermoe.ranks import launch as ranks

def wait_for_rank_zero(rank, folder):
    Path(folder, str(rank)).write_text(str(os.getpid()))
    if rank == 0:
        time.sleep(3600)
    dist.barrier()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test that runs in the background ignores it
    ranks.run_ranks(wait_for_rank_zero, 3, (sys.argv[1],), timedelta(minutes=10))
"""


@pytest.mark.slow
def test_no_rank_outlives_its_parent_however_that_ends(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    parents = []
    for number in signals:
        folder = tmp_path / number.name
        folder.mkdir()
        parents.append(subprocess.Popen([sys.executable, script, folder], stderr=subprocess.DEVNULL))
    try:
        for number, parent in zip(signals, parents, strict=True):
            reports = [tmp_path / number.name / str(rank) for rank in range(3)]
            wait_until(lambda reports=reports: all(r.exists() and r.read_text() for r in reports))
            time.sleep(0.5)  # ranks 1 and 2 are in the barrier, most probably
            pids = [int(report.read_text()) for report in reports]
            assert all(psutil.pid_exists(pid) for pid in pids)
            parent.send_signal(number)
            wait_until(lambda pids=pids: not any(is_running(pid) for pid in pids))
            assert parent.wait() != 0
    finally:
        for parent in parents:
            parent.kill()
            parent.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    """For as long as a test may take."""
    while not condition():
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ranks_of(pid: int) -> list[int]:
    """Processes of the fork server of ``pid``, zombies apart."""
    servers = [child for child in psutil.Process(pid).children() if "forkserver" in " ".join(child.cmdline())]
    return [child.pid for server in servers for child in server.children() if is_running(child.pid)]
