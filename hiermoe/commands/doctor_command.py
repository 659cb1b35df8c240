"""`hiermoe doctor`: what this machine can run, and what each missing thing would take.

A check of `machine` that itself fails is shown as failed, and one that does not end in time as slow: never as ok, and
never as missing either. A slow machine lacks nothing.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hiermoe.commands import machine

_COLOURS = {"ok": "green", "limited": "yellow", "missing": "red", "failed": "magenta", "slow": "blue"}

DEADLINE_SECONDS = 60.0


State = machine.State | Literal["failed", "slow"]


@dataclass(frozen=True)
class Check:
    """One row.

    Attributes:
        name: what was looked at.
        state: as `machine.Answer` has it; ``failed`` is a check that could not be made, ``slow`` one that this machine
            had no time for.
        found: what is there.
        enables: what needs it.
        takes: what would make it ok; empty where nothing is needed.
        required: whether `make reproduce` needs it.
    """

    name: str
    state: State
    found: str
    enables: str
    takes: str = ""
    required: bool = False


@dataclass(frozen=True)
class Question:
    """A check to be made; fields as in `Check`."""

    name: str
    enables: str
    look: Callable[[], machine.Answer]
    required: bool = False

    def row(self, state: State, found: str, takes: str) -> Check:
        """The row for an answer."""
        return Check(self.name, state, found, self.enables, takes, self.required)

    def failed(self, error: BaseException) -> Check:
        """The row for a check that itself failed."""
        first_line, *_ = str(error).split("\n")
        if isinstance(error, TimeoutError):
            return self.row("slow", f"not known: {first_line}", "an idle machine to look at it; run it again")
        found = f"the check itself failed: {type(error).__name__}: {first_line}"
        return self.row("failed", found, "look at what it says")


QUESTIONS = (
    Question("Python, packages", "everything", machine.packages, required=True),
    Question("shipped traces", "make reproduce on recorded routing", machine.traces, required=True),
    Question("cores and memory", "simulation; ranks=local", machine.size, required=True),
    Question("disk for results/", "keeping what was run", machine.disk, required=True),
    Question("Megatron-Core", "hiermoe train, hiermoe record", machine.megatron),
    Question("emulated links", "ranks=emulated", machine.emulated_links),
    Question("GPUs", "a cluster's ranks over NCCL", machine.gpus),
    Question("Slurm", "ON=slurm", machine.slurm),
    Question("torchrun", "one's own launcher instead of Slurm", machine.torchrun),
    Question("calibrated clusters", "predictions for one's own cluster", machine.calibrations),
)


def examine(questions: tuple[Question, ...] = QUESTIONS, deadline_seconds: float = DEADLINE_SECONDS) -> list[Check]:
    """Make all checks at once.

    Args:
        questions: what to check.
        deadline_seconds: what has not ended by then counts as slow. It is left behind: its thread is a daemon, and
            the commands that it may wait for have limits of their own.

    Returns:
        A row for every question, in their order.
    """
    late = TimeoutError(f"no answer within {deadline_seconds:g} s")
    checks = {question.name: question.failed(late) for question in questions}

    def answer(question: Question) -> None:
        try:
            checks[question.name] = question.row(*question.look())
        except BaseException as error:  # an extension may raise anything, SystemExit included
            checks[question.name] = question.failed(error)

    threads = [threading.Thread(target=answer, args=(question,), daemon=True) for question in questions]
    ends = time.monotonic() + deadline_seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(ends - time.monotonic(), 0))
    return list(checks.values())


def what_reproduce_lacks(checks: list[Check]) -> str | None:
    """One line that names every required check that is neither ok nor limited; None where there is none."""
    lacking = [check.name for check in checks if check.required and check.state in ("missing", "failed")]
    return f"make reproduce cannot run here: see {', '.join(lacking)}" if lacking else None


def table(checks: list[Check]) -> Table:
    """The rows for a terminal."""
    drawn = Table(title="What this machine can run", title_justify="left", show_lines=True)
    for column, least in (("check", 10), ("found", 24), ("enables, and what that takes", 24)):
        drawn.add_column(column, overflow="fold", min_width=least)
    for check in checks:
        name = f"{check.name} *" if check.required else check.name
        state = f"[{_COLOURS[check.state]}]{check.state}[/]"
        takes = f"\ntakes: {escape(check.takes)}" if check.takes else ""
        drawn.add_row(f"{name}\n{state}", escape(check.found), f"{check.enables}{takes}")
    drawn.caption = "* make reproduce needs it"
    return drawn


def examine_and_print(as_json: bool) -> int:
    """Make all checks and print them.

    Args:
        as_json: the same as one JSON object: ``reproduce`` (whether it can run), ``checks``.

    Returns:
        Exit code: 0 where everything that `make reproduce` needs is there, else 1.
    """
    checks = examine()
    lacking = what_reproduce_lacks(checks)
    if as_json:
        print(json.dumps({"reproduce": lacking is None, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        Console().print(table(checks))
    if lacking is not None:
        Console(stderr=True, highlight=False, soft_wrap=True).print(lacking)
    return 0 if lacking is None else 1
