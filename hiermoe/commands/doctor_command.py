"""`hiermoe doctor`: what this machine can run, and what each missing thing would take.

Facts come from `machine`; here they are judged, by pure functions, and printed. A check that itself fails, or
does not end in time, is shown as failed: never as ok, and never as missing either.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from hiermoe.commands import machine

State = Literal["ok", "limited", "missing", "failed"]
_COLOURS = {"ok": "green", "limited": "yellow", "missing": "red", "failed": "magenta"}

DEADLINE_SECONDS = 11.0

# Resident size of one of four gloo ranks from the fork server after its first collective, torch 2.13 and Megatron-Core
# 0.16.1 on CPU: 333 MB. All but 10 MB of it is shared with the others until a rank works on tensors of its own, so this
# assumption is on the safe side for small replays and about right for training a narrow model.
RANK_BYTES = 335 * 10**6
# Largest resident size of `hiermoe run measure=predict` on recorded routing, 32 GPUs: 491 MB.
SIMULATION_BYTES = 500 * 10**6
# All runs of a whole reproduction take under 20 MB, its report 30 MB; the rest is room for recorded traces.
RESULTS_BYTES = 500 * 10**6


@dataclass(frozen=True)
class Check:
    """One row.

    Attributes:
        name: what was looked at.
        state: ``limited`` is there with less than it could be; ``failed`` is a check that could not be made.
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
    """A check to be made: how to find the facts and how to judge them."""

    name: str
    enables: str
    look: Callable[[], Any]
    judge: Callable[[Any], tuple[State, str, str]]  # state, found, takes
    required: bool = False

    def answered(self, facts: Any) -> Check:
        """The row for these facts."""
        state, found, takes = self.judge(facts)
        return Check(self.name, state, found, self.enables, takes, self.required)

    def unanswered(self, error: BaseException) -> Check:
        """The row for a look that raised."""
        lines = str(error).splitlines() or [""]
        return Check(
            self.name,
            "failed",
            f"the check itself failed: {type(error).__name__}: {lines[0]}",
            self.enables,
            "look at what the check says; run it again on an idle machine if it was too slow",
            self.required,
        )


def judge_packages(facts: machine.Packages) -> tuple[State, str, str]:
    """Required ranges first, tested versions second."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    wrong = []
    if not SpecifierSet(facts.python_range).contains(facts.python, prereleases=True):
        wrong.append(f"Python {facts.python} (needs {facts.python_range})")
    for name, line in facts.ranges.items():
        have = facts.installed[name]
        if have is None:
            wrong.append(f"{name} is not installed")
        elif not Requirement(line).specifier.contains(have, prereleases=True):
            wrong.append(f"{name} {have} (needs {Requirement(line).specifier})")
    if wrong:
        return "missing", "; ".join(wrong), "make setup (with PYTHON=<a newer one> where Python is too old)"
    # A local part such as +cpu or +cu126 names a build of the same version.
    other = [
        f"{name} {have} (tested: {facts.tested[name]})"
        for name, have in facts.installed.items()
        if have is not None and name in facts.tested and have.split("+")[0] != facts.tested[name]
    ]
    found = f"Python {facts.python}, {len(facts.ranges)} packages in their ranges"
    if other:
        return "limited", f"{found}; not the tested version: {', '.join(other)}", "make setup installs constraints.txt"
    return "ok", f"{found}, in the tested versions", ""


def judge_megatron(facts: machine.Megatron) -> tuple[State, str, str]:
    """On CPU none of the back ends is needed."""
    if facts.version is None or facts.import_error is not None:
        name = "Megatron-Core" if facts.version is None else f"Megatron-Core {facts.version}"
        return "missing", f"{name}: {facts.import_error}", "make setup"
    there = ", ".join(facts.back_ends)
    absent = ", ".join(name for name in machine.BACK_ENDS if name not in facts.back_ends)
    parts = [f"{facts.version} imports", f"back ends there: {there or 'none'}"]
    if absent:
        parts.append(f"not there, and not needed on CPU: {absent}")
    return "ok", "; ".join(parts), ""


def judge_size(facts: machine.Size) -> tuple[State, str, str]:
    """How many ranks fit in memory; more ranks than cores only wait for each other."""
    ranks = facts.free_bytes // RANK_BYTES
    found = (
        f"{facts.cores} cores, {facts.free_bytes / 1e9:.1f} GB free: {ranks} ranks fit at {RANK_BYTES // 10**6} MB "
        f"each (measured, shared pages counted), {min(ranks, facts.cores)} with a core of their own"
    )
    if facts.free_bytes < SIMULATION_BYTES:
        return "missing", found, f"{SIMULATION_BYTES / 1e9:g} GB of free memory for one simulation"
    if ranks < 8:
        return "limited", found, f"{8 * RANK_BYTES / 1e9:.1f} GB of free memory for world_size=8"
    return "ok", found, ""


def judge_namespaces(facts: machine.Namespaces) -> tuple[State, str, str]:
    """Ok only where a shaped link was made and the kernel gave it the rate that was asked for."""
    if facts.refused is not None:
        return "missing", "no emulated links", facts.refused
    if facts.found_bytes_per_s != facts.wanted_bytes_per_s:
        found = f"a link asked for {facts.wanted_bytes_per_s} B/s has {facts.found_bytes_per_s} B/s"
        return "limited", found, "a kernel whose sch_tbf keeps the rate"
    return "ok", f"namespaces, veth and tbf work: a link of {facts.wanted_bytes_per_s / 1e6:g} MB/s was made", ""


def judge_gpus(facts: machine.Gpus) -> tuple[State, str, str]:
    """All of GPU, driver, CUDA build and NCCL."""
    build = f"torch for CUDA {facts.cuda_build}" if facts.cuda_build else "torch without CUDA"
    parts = [
        f"{len(facts.devices)} GPUs" + (f" ({', '.join(sorted(set(facts.devices)))})" if facts.devices else ""),
        f"driver {facts.driver}" if facts.driver else "no NVIDIA driver",
        build,
        f"NCCL {facts.nccl}" if facts.nccl else "no NCCL",
    ]
    found = ", ".join(parts)
    if facts.devices and facts.cuda_build and facts.nccl:
        return "ok", found, ""
    if facts.driver is None and not facts.devices:
        more = "" if facts.cuda_build else ", and a CUDA build of torch"
        return "missing", found, f"a machine with NVIDIA GPUs and their driver{more}"
    if facts.cuda_build is None or facts.nccl is None:
        return "limited", found, "a CUDA build of torch with NCCL in this environment"
    return "limited", found, "a GPU that torch can see (CUDA_VISIBLE_DEVICES, driver not older than torch's CUDA)"


def judge_slurm(facts: machine.Slurm) -> tuple[State, str, str]:
    """Inside an allocation srun is enough; outside, the controller must answer."""
    there = f"found {', '.join(facts.commands)}" if facts.commands else "no Slurm commands"
    if facts.job is not None and facts.refused is None:
        return "ok", f"inside allocation {facts.job}; {there}", ""
    if len(facts.commands) < 3:
        return "missing", there, "a login node of a Slurm cluster (sbatch, sinfo and squeue on the path)"
    if facts.refused is not None:
        return "limited", f"{there}, but no controller answers: {facts.refused}", "a slurm.conf that names a controller"
    if not facts.partitions:
        return "limited", f"{there}; sinfo lists no partition", "access to a partition"
    return "ok", f"{there}; partitions: {'; '.join(facts.partitions)}", ""


def judge_torchrun(facts: str | None) -> tuple[State, str, str]:
    """It comes with torch."""
    if facts is None:
        return "missing", "not in this environment, not on the path", "make setup (it comes with torch)"
    return "ok", "found", ""


def judge_disk(facts: machine.Disk) -> tuple[State, str, str]:
    """Room for a whole reproduction."""
    found = f"{facts.free_bytes / 1e9:.1f} GB free"
    if not facts.writable:
        return "missing", f"{found}, but it cannot be written", "permission to write to results/"
    if facts.free_bytes < RESULTS_BYTES:
        return "missing", found, f"{RESULTS_BYTES / 1e9:g} GB free where results/ is"
    return "ok", found, ""


def judge_traces(facts: machine.Files) -> tuple[State, str, str]:
    """Every one of them, or recorded routing cannot be reproduced."""
    if facts.broken:
        found = "; ".join(f"{name}: {reason}" for name, reason in facts.broken.items())
        return "missing", found, "git checkout results/traces"
    return "ok", f"whole: {', '.join(facts.whole)}", ""


def judge_calibrations(facts: machine.Files) -> tuple[State, str, str]:
    """None is needed for the paper's own clusters, which are shipped."""
    if facts.broken:
        found = "; ".join(f"{name}: {reason}" for name, reason in facts.broken.items())
        return "limited", found, "hiermoe calibrate writes the file anew"
    if not facts.whole:
        return "missing", "none in results/clusters", "hiermoe calibrate cluster=<name> ranks=<where they are>"
    return "ok", ", ".join(facts.whole), ""


QUESTIONS = (
    Question("Python, packages", "everything", machine.packages, judge_packages, required=True),
    Question("shipped traces", "make reproduce on recorded routing", machine.traces, judge_traces, required=True),
    Question("cores and memory", "simulation; ranks=local", machine.size, judge_size, required=True),
    Question("disk for results/", "keeping what was run", machine.disk, judge_disk, required=True),
    Question("Megatron-Core", "hiermoe train, hiermoe record", machine.megatron, judge_megatron),
    Question("emulated links", "ranks=emulated", machine.namespaces, judge_namespaces),
    Question("GPUs", "a cluster's ranks over NCCL", machine.gpus, judge_gpus),
    Question("Slurm", "ON=slurm", machine.slurm, judge_slurm),
    Question("torchrun", "one's own launcher instead of Slurm", machine.torchrun, judge_torchrun),
    Question("calibrated clusters", "predictions for one's own cluster", machine.calibrations, judge_calibrations),
)


def examine(questions: tuple[Question, ...] = QUESTIONS, deadline_seconds: float = DEADLINE_SECONDS) -> list[Check]:
    """Make all checks at once.

    Args:
        questions: what to check.
        deadline_seconds: what has not ended by then counts as failed. It is left behind: its thread is a daemon, and
            the commands that it may wait for have limits of their own.

    Returns:
        A row for every question, in their order.
    """
    checks: dict[int, Check] = {}

    def answer(number: int, question: Question) -> None:
        try:
            checks[number] = question.answered(question.look())
        except BaseException as error:  # an extension may raise anything, SystemExit included
            checks[number] = question.unanswered(error)

    threads = [threading.Thread(target=answer, args=pair, daemon=True) for pair in enumerate(questions)]
    ends = time.monotonic() + deadline_seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(ends - time.monotonic(), 0))
    late = TimeoutError(f"no answer within {deadline_seconds:g} s")
    return [checks.get(number) or question.unanswered(late) for number, question in enumerate(questions)]


def what_reproduce_lacks(checks: list[Check]) -> str | None:
    """One line that names every required check that is neither ok nor limited; None where there is none."""
    lacking = [check.name for check in checks if check.required and check.state in ("missing", "failed")]
    return f"make reproduce cannot run here: see {', '.join(lacking)}" if lacking else None


def table(checks: list[Check]) -> Table:
    """The rows for a terminal."""
    drawn = Table(title="What this machine can run", title_justify="left", show_lines=True)
    for column in ("check", "state", "found", "enables", "what it takes"):
        drawn.add_column(column, overflow="fold")
    for check in checks:
        name = f"{check.name} *" if check.required else check.name
        state = f"[{_COLOURS[check.state]}]{check.state}[/]"
        drawn.add_row(name, state, _plain(check.found), check.enables, _plain(check.takes))
    drawn.caption = "* make reproduce needs it"
    return drawn


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


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
