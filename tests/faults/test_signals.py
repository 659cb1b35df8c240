"""A signal ends a command in one line, with exit code 128 + n, whenever it comes and however often; nothing is left."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hiermoe.ranks.server import state_of
from hiermoe.records.project import CODE

SECONDS = 120.0  # a busy machine takes long to import
RUN = ["run", "measure=replay", "ranks=local", "world_size=2", "narrowed=64", "system=hd1", "tokens_per_rank=16"]
RUN += ["routing=uniform", "wandb.mode=disabled", "iterations={}"]
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
Moment = Callable[["subprocess.Popen[str]", Path], bool]


def handlers_are_set(process: "subprocess.Popen[str]", home: Path) -> bool:
    """As soon as the first lines of the entry have run."""
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return caught is not None and int(caught[1], 16) >> (signal.SIGQUIT - 1) & 1 == 1


def torch_is_imported(process: "subprocess.Popen[str]", home: Path) -> bool:
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


def ranks_run(process: "subprocess.Popen[str]", home: Path) -> bool:
    return any(path.stat().st_size for path in home.glob(".cache/scratch/*/rank-1.jsonl"))


MOMENTS: dict[str, Moment] = {
    "at the start": handlers_are_set,
    "while torch is imported": torch_is_imported,
    "while ranks run": ranks_run,
}


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="faults-") as name:  # short, so that it is also taken for sockets
        (Path(name) / "tmp").mkdir()
        yield Path(name)


def begin(home: Path, iterations: int, ignored: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    """The command in a session of its own, with some signals ignored at its start and no others."""

    def prepare() -> None:
        for name in NAMES:
            signal.signal(signal.Signals[name], signal.SIG_IGN if name in ignored else signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, "-m", "hiermoe", *(argument.format(iterations) for argument in RUN)],
        cwd=home,
        env=os.environ | {"PYTHONPATH": str(CODE), "HIERMOE_HOME": str(home), "TMPDIR": str(home / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=prepare,
    )


def wait_for(moment: Moment, process: "subprocess.Popen[str]", home: Path) -> None:
    stop = time.monotonic() + SECONDS
    while not moment(process, home):
        assert process.poll() is None and time.monotonic() < stop
        time.sleep(0.005)


def check_left_overs(process: "subprocess.Popen[str]", home: Path) -> None:
    stop = time.monotonic() + 10
    while of_session(process.pid) and time.monotonic() < stop:  # the kernel ends what came from the fork server
        time.sleep(0.05)
    assert not of_session(process.pid)
    assert not list((home / "tmp").iterdir())
    assert not [*home.glob(".cache/scratch/*")]


def of_session(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(path.name)) == pid and state_of(int(path.name)) not in ("", "Z", "X"):
                found.append(int(path.name))
        except ProcessLookupError:
            pass
    return found


ONCE = [(moment, name, 1, False) for moment in MOMENTS for name in NAMES]
TWICE = [(moment, "SIGINT", 2, False) for moment in MOMENTS] + [("while ranks run", "SIGTERM", 2, False)]
TO_ALL = [("while ranks run", name, 1, True) for name in NAMES] + [("while torch is imported", "SIGINT", 2, True)]
SENT = [
    pytest.param(*row, id=f"{row[1]}{' twice' * (row[2] == 2)}{' to all processes' * row[3]} {row[0]}")
    for row in (*ONCE, *TWICE, *TO_ALL)
]


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "name", "times", "to_all"), SENT)
def test_a_signal_ends_a_command_in_one_line(moment: str, name: str, times: int, to_all: bool, home: Path) -> None:
    number = signal.Signals[name]
    process = begin(home, iterations=3000)
    try:
        wait_for(MOMENTS[moment], process, home)
        for _ in range(times):
            (os.killpg if to_all else os.kill)(process.pid, number)
            time.sleep(0.05)
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    by = "" if name == "SIGINT" else f" by {name}"
    assert err == f"error: interrupted{by}; finished runs are kept, the same command goes on with the rest\n"
    assert out.strip() == "" and process.returncode == 128 + number
    check_left_overs(process, home)


IGNORED = [pytest.param((name,), id=f"{name} ignored at the start") for name in ("SIGINT", "SIGHUP", "SIGQUIT")]


@pytest.mark.slow
@pytest.mark.parametrize("ignored", IGNORED)
def test_what_is_ignored_at_the_start_stays_ignored(ignored: tuple[str, ...], home: Path) -> None:
    process = begin(home, 200, ignored)
    try:
        wait_for(ranks_run, process, home)
        os.killpg(process.pid, signal.Signals[ignored[0]])
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0 and err == "" and "record: " in out
    check_left_overs(process, home)


COUNT = len(SENT) + len(IGNORED)


def test_the_page_on_reliability_counts_these() -> None:
    assert f"({COUNT} injections)" in (CODE / "docs" / "reliability.md").read_text()
