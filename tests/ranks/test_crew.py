"""An allocation's processes as one world: what ends well, and that nothing hangs where it does not."""

import os
import re
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hiermoe.ranks import crew as crew_module
from hiermoe.ranks.crew import Crew, CrewEnded, leave
from hiermoe.ranks.server import fork_server
from hiermoe.ranks.streams import RowStream
from hiermoe.records.keep import RunDied
from hiermoe.records.status import NotApplicable

RANKS = 3
TIMEOUT = timedelta(hours=1)  # of a collective; no test lasts so long, so what ends did not wait for it
SHORT = 1.0  # seconds of grace where ranks are stuck, and it must pass


@dataclass
class Ended:
    """How the processes of a crew ended."""

    codes: list[int | None]
    errors: list[str]
    output: str


def start(
    program: Callable[[Crew], None],
    tmp_path: Path,
    ranks: int = RANKS,
    slurm: bool = False,
    timeout: timedelta = TIMEOUT,
    grace: float = TIMEOUT.total_seconds(),
) -> Ended:
    """Run a crew of processes whose rank 0 runs the program."""
    context = fork_server()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "crew"
    folder.mkdir()
    args = (program, port, folder, slurm, timeout, grace)
    processes = [context.Process(target=_process, args=(rank, *args)) for rank in range(ranks)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
    errors = [(folder / f"{rank}.err").read_text() for rank in range(ranks)]
    output = (folder / "0.out").read_text()
    return Ended([process.exitcode for process in processes], errors, output)


def _process(
    rank: int,
    program: Callable[[Crew], None],
    port: int,
    folder: Path,
    slurm: bool,
    timeout: timedelta,
    grace: float,
) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    crew_module._GRACE_SECONDS = grace
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    if slurm:
        names = {"SLURM_PROCID": rank, "SLURM_LOCALID": 0, "SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0}
        names |= {"SLURM_STEP_NUM_TASKS": RANKS, "SLURMD_NODENAME": f"n{rank + 1}"}
    else:
        names = {"RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    crew = Crew.join("cpu", timeout, folder)
    if rank > 0:
        crew.serve()
        return
    try:
        with crew:
            program(crew)
    except CrewEnded as error:
        leave(error)


def stream(rank: int, iterations: int, folder: Path) -> None:
    """Two rows' worth of a run."""
    with RowStream(folder, rank) as rows:
        for iteration in range(iterations):
            total = torch.tensor(rank)
            dist.all_reduce(total)
            rows.write([{"iteration": iteration, "rank": rank, "total": int(total)}])


def refuse(rank: int, error: type[Exception], folder: Path) -> None:
    """Bad input, seen by every rank."""
    raise error("experts=3 do not fit")


def fail_alone(rank: int, error: type[Exception], folder: Path) -> None:
    """One rank fails where the others go on to a collective."""
    with RowStream(folder, rank):
        if rank == 1:
            raise error("mine alone")
        dist.barrier()


def die(rank: int, victim: int, folder: Path) -> None:
    """A rank is killed, as by a machine that runs out of memory."""
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def stall(rank: int, folder: Path) -> None:
    """A rank that comes when the others have given up."""
    said = [Path("/proc/self/fd/2").resolve().with_name(f"{other}.err") for other in (0, 1)]
    while rank == 2 and not all("the job ends" in file.read_text() for file in said):
        time.sleep(0.1)
    dist.barrier()


def collects(crew: Crew) -> None:
    seen: list[int] = []
    rows = crew.run(stream, (4,), seen.append)
    assert sorted(zip(rows["rank"], rows["iteration"], strict=True)) == [(r, i) for r in range(RANKS) for i in range(4)]
    assert set(rows["total"]) == {3}
    assert seen == [0, 1, 2, 3]
    print(*crew.hosts)


def goes_on_after_refusals(crew: Crew) -> None:
    with pytest.raises(RunDied, match="rank 0 of 3 failed: experts=3 do not fit"):
        crew.run(refuse, (ValueError,))
    with pytest.raises(NotApplicable, match="experts=3"):
        crew.run(refuse, (NotApplicable,))
    assert len(crew.run(stream, (2,))) == 2 * RANKS


def one_refuses(crew: Crew) -> None:
    crew.run(fail_alone, (ValueError,))


def one_errs(crew: Crew) -> None:
    crew.run(fail_alone, (KeyError,))


def one_dies(crew: Crew) -> None:
    crew.run(die, (2,))


def leader_dies(crew: Crew) -> None:
    crew.run(die, (0,))


def one_stalls(crew: Crew) -> None:
    crew.run(stall, ())


def program_fails(crew: Crew) -> None:
    raise SystemExit(5)


@pytest.mark.parametrize("slurm", [False, True])
def test_rank_zero_gets_the_rows_of_all_ranks(tmp_path: Path, slurm: bool) -> None:
    ended = start(collects, tmp_path, slurm=slurm)
    assert ended.codes == [0, 0, 0], ended.errors
    assert ended.output.split() == (["n1", "n2", "n3"] if slurm else [socket.gethostname()] * 3)


def test_bad_input_that_all_ranks_refuse_leaves_the_crew_usable(tmp_path: Path) -> None:
    ended = start(goes_on_after_refusals, tmp_path)
    assert ended.codes == [0, 0, 0], ended.errors


@pytest.mark.parametrize("program", [one_refuses, one_errs])
def test_an_error_on_one_rank_ends_all_and_is_named(tmp_path: Path, program: Callable[[Crew], None]) -> None:
    ended = start(program, tmp_path, grace=SHORT)
    assert ended.codes[1] == crew_module._FATAL
    assert all(ended.codes)
    assert "error: rank 1 of 3 failed: " in ended.errors[1]
    assert "rank 0, 2 of 3 is dead or waits in a collective; the job ends" in ended.errors[1]


def test_a_dead_rank_ends_all_and_is_named(tmp_path: Path) -> None:
    ended = start(one_dies, tmp_path, grace=SHORT)
    assert ended.codes == [crew_module._FATAL, crew_module._FATAL, -signal.SIGKILL]
    assert re.search(r"rank (1, )?2 of 3 is dead", ended.errors[0])  # rank 1 may still be on its way out


@pytest.mark.slow
def test_ranks_do_not_outlive_a_dead_rank_zero(tmp_path: Path) -> None:
    ended = start(leader_dies, tmp_path)
    assert ended.codes == [-signal.SIGKILL, crew_module._FATAL, crew_module._FATAL]


def test_a_program_that_ends_with_an_error_sends_the_others_home(tmp_path: Path) -> None:
    assert start(program_fails, tmp_path).codes == [5, 0, 0]


@pytest.mark.slow
def test_ranks_that_never_come_are_reported(tmp_path: Path) -> None:
    ended = start(collects, tmp_path, ranks=2, timeout=timedelta(seconds=2))
    assert all(ended.codes)


@pytest.mark.slow
def test_ranks_that_wait_for_one_that_stalls_end_after_the_timeout(tmp_path: Path) -> None:
    for seconds in (3, 12, 48):  # on a busy machine the ranks may not even find each other in this time
        folder = tmp_path / str(seconds)
        folder.mkdir()
        ended = start(one_stalls, folder, timeout=timedelta(seconds=seconds), grace=SHORT)
        if not any("could not join" in error or "in vain" in error for error in ended.errors):
            break
    assert ended.codes[:2] == [crew_module._FATAL, crew_module._FATAL]
    assert re.search(r"rank (1, )?2 of 3 is dead or waits in a collective", ended.errors[0])
