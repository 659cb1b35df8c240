"""Submits a measured reproduction to Slurm and follows it: its state, its progress, and why it failed."""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import submitit
import yaml
from pydantic import Field, model_validator
from rich.console import Console
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import Checkpointable

from hiermoe.records.keep import Outcome
from hiermoe.records.project import CONF, JOBS, WORKPLACE, shown
from hiermoe.records.strict import Strict, checked
from hiermoe.records.whole_file import write_whole

_POLL_SECONDS = 2.0
_LAST_LINES = 15
_MOST_OTHERS = 4  # ranks whose errors are shown beside rank 0's
_FROM_OUTSIDE = ("CANCELLED", "TIMEOUT", "PREEMPTED", "DEADLINE", "REVOKED")  # what ranks say then is only that
# Slurm forgets a job some minutes after its end, and a shared file system may show a file late.
_FORGOTTEN_SECONDS = 30.0
_GOING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESIZING")
_MANY_TIMES = 1000  # a job that its time limit ends goes back into the queue so often


Program = Callable[..., list[Outcome] | None]
"""Importable; what every process of a job calls. What it returns on rank 0 is the job's result."""


class SlurmConfig(Strict):
    """What to ask Slurm for; the schema of conf/slurm.yaml."""

    nodes: int = Field(ge=1)
    gpus_per_node: int = Field(ge=1)
    partition: str | None
    account: str | None
    device: Literal["cpu", "cuda"]
    time_limit_min: int = Field(ge=1)
    cpus_per_task: int | None = Field(ge=1)
    preemption_notice_s: int = Field(ge=1)

    @model_validator(mode="before")
    @classmethod
    def _is_complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in ("nodes", "gpus_per_node"):
            if values[name] is None:
                raise ValueError(f"ON=slurm needs {name.upper()}=: how many to ask for")
        return values

    @classmethod
    def given(cls, **options: Any) -> Self:
        """The defaults of conf/slurm.yaml, and the options that are not None.

        Raises:
            ValueError: one line that names the first option that breaks a rule.
        """
        values = yaml.safe_load((CONF / "slurm.yaml").read_text(encoding="utf-8"))
        values |= {name: value for name, value in options.items() if value is not None}
        return checked(values, cls)


class Job(Checkpointable):
    """What runs in the allocation, and the same again after a preemption: that leaves out what has a record."""

    def __call__(self, program: Program, **options: Any) -> list[Outcome] | None:
        """On every process of the allocation."""
        return program(**options)


def run_job(program: Program, options: dict[str, Any], config: SlurmConfig, console: Console) -> list[Outcome]:
    """Run a program on every process of a job, and show how it goes.

    Where a job for the same is under way already, that one is followed.

    Args:
        program: what to run.
        options: its arguments.
        config: what to ask for.
        console: for the state and what rank 0 prints.

    Returns:
        The outcomes of all runs.

    Raises:
        ValueError: Slurm is not here, refused the job, or the job failed.
        KeyboardInterrupt: as elsewhere; the job goes on.
    """
    for command in ("sbatch", "squeue"):
        if shutil.which(command) is None:
            raise ValueError(
                f"ON=slurm: {command} is not found here; run this on a login node of a Slurm cluster, or "
                "ON=allocation inside an allocation"
            )
    named = json.dumps({"options": options, "slurm": config.model_dump()}, sort_keys=True, default=str)
    job_id = _under_way(named)
    if job_id is not None:
        console.print(f"job {job_id} is under way for the same: following it")
        job = submitit.SlurmJob(folder=JOBS / "%j", job_id=job_id, tasks=[0])
    else:
        job = _submit(program, options, config)
        write_whole(JOBS / job.job_id / "request.json", named.encode())
        console.print(f"job {job.job_id}: submitted, {config.nodes} nodes x {config.gpus_per_node} processes")
    try:
        state = _follow(job, console)
    except KeyboardInterrupt:
        console.print(
            f"job {job.job_id} goes on without this; the same command follows it, scancel {job.job_id} ends it"
        )
        raise
    log = job.paths.stdout
    if state not in ("COMPLETED", "gone"):
        raise _failure(job, state, console)
    if not _appears(job.paths.result_pickle):
        raise _failure(job, f"{state}, without a result", console)
    kind, result = pickle.loads(job.paths.result_pickle.read_bytes())
    if kind != "success":
        raise _failure(job, "an error", console)
    console.print(f"job {job.job_id}: completed, log {shown(log)}")
    return result


def state_of(job_id: str) -> tuple[str, str]:
    """State of a job in Slurm's word, and the reason of it in another.

    The state is ``gone`` where Slurm has forgotten the job, ``unknown`` where it does not answer.
    """
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T %r"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return "gone" if "Invalid job id" in done.stderr else "unknown", ""
    state, _, reason = done.stdout.partition("\n")[0].partition(" ")
    return state or "gone", reason


def _under_way(named: str) -> str | None:
    """A job for the same request that has not ended."""
    for path in JOBS.glob("*/request.json"):
        if path.read_text(encoding="utf-8") == named and state_of(path.parent.name)[0] in _GOING:
            return path.parent.name
    return None


def _submit(program: Program, options: dict[str, Any], config: SlurmConfig) -> submitit.Job[Any]:
    """Submit.

    Raises:
        ValueError: Slurm refused it, in its words.
    """
    executor = submitit.AutoExecutor(folder=JOBS / "%j", cluster="slurm", slurm_max_num_timeout=_MANY_TIMES)
    optional = {
        "slurm_partition": config.partition,
        "slurm_account": config.account,
        "cpus_per_task": config.cpus_per_task,
        "gpus_per_node": config.gpus_per_node if config.device == "cuda" else None,
    }
    executor.update_parameters(
        name="hiermoe",
        nodes=config.nodes,
        tasks_per_node=config.gpus_per_node,
        timeout_min=config.time_limit_min,
        stderr_to_stdout=True,
        slurm_signal_delay_s=config.preemption_notice_s,
        # One process that ends badly ends all: the others would wait for it.
        slurm_srun_args=["--kill-on-bad-exit=1"],
        slurm_additional_parameters={"requeue": True, "chdir": str(WORKPLACE)},
        **{name: value for name, value in optional.items() if value is not None},
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats there what the error says
            return executor.submit(Job(), program, **options)
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        told = re.findall(r"^sbatch: (?:error: )?(.*\S)", str(error), re.MULTILINE) or str(error).strip().splitlines()
        raise ValueError(f"Slurm refused the job: {' / '.join(told)}") from error


def _follow(job: submitit.Job[Any], console: Console) -> str:
    """Show the state and what rank 0 prints until the job has ended; the state then."""
    shown, position, silent_since = "", 0, time.monotonic()
    while True:
        state, reason = state_of(job.job_id)
        position = _print_lines(job.paths.stdout, position, console)
        if state != shown:
            why = f" ({reason})" if state == "PENDING" and reason not in ("", "None") else ""
            console.print(f"job {job.job_id}: {state.lower()}{why}")
            shown = state
        if state != "unknown":
            silent_since = time.monotonic()
        elif time.monotonic() - silent_since > 60 * _FORGOTTEN_SECONDS:
            raise ValueError(f"Slurm does not answer any more; job {job.job_id} may go on, the same command follows it")
        if state not in (*_GOING, "unknown"):
            _print_lines(job.paths.stdout, position, console)
            return state
        time.sleep(_POLL_SECONDS)


def _print_lines(log: Path, position: int, console: Console) -> int:
    """Copy whole new lines of the log, but for submitit's own; the position behind them."""
    if not log.exists():
        return position
    with log.open("rb") as file:
        if log.stat().st_size < position:  # begun anew, as the job was
            position = 0
        file.seek(position)
        new = file.read()
    end = new.rfind(b"\n") + 1
    for line in new[:end].decode(errors="replace").splitlines():
        if not line.startswith("submitit ") and line.strip():
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    return position + end


def _appears(path: Path) -> bool:
    ends = time.monotonic() + _FORGOTTEN_SECONDS
    while not path.exists():
        if time.monotonic() > ends:
            return False
        time.sleep(_POLL_SECONDS / 4)
    return True


def _failure(job: submitit.Job[Any], state: str, console: Console) -> ValueError:
    """The error for a job that failed, after the last lines of rank 0's log and what other ranks said."""
    log = job.paths.stdout
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:] if log.exists() else []
    if state not in _FROM_OUTSIDE:
        lines += sorted(_errors_of_others(log))[:_MOST_OTHERS]
    for line in lines:
        print(f"  | {line}", file=sys.stderr)
    sys.stderr.flush()
    console.file.flush()
    where = shown(log) if log.exists() else f"{shown(log)} (not there: no process started)"
    return ValueError(
        f"Slurm job {job.job_id} ended as {state}; finished runs are kept, the same command goes on; log: {where}"
    )


def _errors_of_others(log: Path) -> Iterator[str]:
    """The last error of every rank but 0, after the name of its log."""
    for other in log.parent.glob("*_log.out"):
        said = other.read_text(encoding="utf-8", errors="replace").splitlines() if other != log else []
        yield from [f"{other.name}: {line}" for line in said if "error:" in line.lower()][-1:]


def slurm_job_name() -> str:
    """Of the allocation that this process is in, for a reader: Slurm's job, else this process."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"process {os.getpid()}" if job is None else f"Slurm job {job}"
