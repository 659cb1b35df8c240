"""What ``make reproduce`` does: the paper's sweeps in simulation, measured ones where that is possible, the report."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hiermoe.analysis.claims import load_rules
from hiermoe.analysis.report import write_report
from hiermoe.analysis.verdicts import verdict_summary
from hiermoe.ranks.emulated.requirements import missing_requirement
from hiermoe.records.keep import Outcome
from hiermoe.records.store import RunStore
from hiermoe.runs.calibration import calibrate, calibration_config
from hiermoe.runs.compose import Cell, expand, sweep_names
from hiermoe.runs.execute import execute_together, num_steps
from hiermoe.runs.indexing import index_runs
from hiermoe.runs.measured_cells import Amount, MeasuredCell, clusters_of, measured_cells, together
from hiermoe.runs.run_config import RunConfig, WandbMode
from hiermoe.runs.sweep import run_all
from hiermoe.runs.tracking import mirror_table
from hiermoe.runs.training import TrainRunConfig, expand_training

Cells = Mapping[str, Sequence[Cell]]


@dataclass(frozen=True)
class Session:
    """What all parts of one reproduction share."""

    store: RunStore
    console: Console
    workers: int
    started: float

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.started


def reproduce(
    sweeps: Iterable[str] | None = None,
    workers: int | None = None,
    wandb_mode: WandbMode = "offline",
    amount: Amount = "default",
) -> None:
    """Run what has no record yet, write the report, and print the verdicts.

    Args:
        sweeps: names of simulated ones, and nothing measured; None for all and what can be measured here. The report
            covers all of them, with what records there are.
        workers: processes of the simulation; None for one a core.
        wandb_mode: how the verdicts are mirrored in W&B, if any run is new.
        amount: how much is measured.

    Raises:
        ValueError: an unknown sweep, or runs that failed; the report is written before that.
    """
    session = Session(RunStore(), Console(), workers or os.cpu_count() or 1, time.perf_counter())
    console = session.console
    with console.status("reading conf/ and sweeps/"):
        cells = {name: expand(name) for name in sweeps or simulated_sweeps(amount)}
    if sweeps is not None:
        finish(simulate_all(cells, session), session, wandb_mode, cells)
        return
    lacking = missing_requirement()
    console.print(PLANS["simulated" if lacking else amount])
    judged = simulated_sweeps("default")
    outcomes = simulate_all({name: sweep for name, sweep in cells.items() if name in judged}, session)
    if any(not outcome.cached for outcome in outcomes):
        write(session, cells, "first report, all simulated verdicts")
    if lacking is None:
        outcomes += measure_emulated(amount, session)
    else:
        console.print(
            f"[yellow]left out[/yellow]: measured runs on an emulated cluster. {lacking}\n"
            "  as root: [bold]make reproduce[/bold]; what is done is kept"
        )
    outcomes += simulate_all({name: sweep for name, sweep in cells.items() if name not in judged}, session)
    finish(outcomes, session, wandb_mode, cells)


PLANS: Mapping[str, str] = {
    "simulated": "simulation of every figure",
    "quick": "simulation of the paper's figures, then a first look at measured numbers on 8 emulated ranks: about 5 "
    "minutes",
    "default": "simulation of the paper's figures and a first report, then on 32 emulated ranks calibration and Fig. "
    "11 of one model, then what lies beyond the paper: 25 minutes on two cores (QUICK=1: 5, FULL=1: 70). Stop and go "
    "on as you like",
    "full": "simulation of the paper's figures and a first report, then on 32 emulated ranks calibration, Fig. 11 of "
    "both models, Fig. 13, Table IV (K), update frequency, searched placements, and whole training steps, then what "
    "lies beyond the paper: 70 minutes on two cores. Stop and go on as you like",
}


def simulated_sweeps(amount: Amount) -> list[str]:
    """Names of an amount's sweeps: those of the paper's figures and tables, of all its claims, or all there are."""
    if amount == "full":
        return sweep_names()
    places = load_rules().sweeps.items()
    return sorted({name for place, name in places if amount == "default" or place.startswith(("Fig.", "Table"))})


def simulate_all(cells: Cells, session: Session) -> list[Outcome]:
    """Run simulated sweeps on all cores, with one progress bar each."""
    if not cells:
        return []
    configs = (cell.config for sweep in cells.values() for cell in sweep)
    with _progress(session.console) as progress:
        runs = {name: {cell.config.run_id for cell in sweep} for name, sweep in cells.items()}
        total = progress.add_task("all runs", total=len(set().union(*runs.values())))
        tasks = {name: progress.add_task(name, total=len(ids)) for name, ids in runs.items()}

        def finished(outcome: Outcome) -> None:
            progress.advance(total)
            for name, ids in runs.items():
                if outcome.run_id in ids:
                    progress.advance(tasks[name])

        return run_all(configs, session.workers, finished, session.store)


def measure_emulated(amount: Amount, session: Session) -> list[Outcome]:
    """Calibrate the emulated clusters of an amount unless that is done, then measure."""
    for name in clusters_of(amount):
        config = calibration_config(name.removesuffix("_calibrated"), "emulated")
        if not (session.store.is_done(config.run_id) and config.path.exists()):
            with _progress(session.console) as progress:
                task = progress.add_task("calibrating", total=num_steps(config))
                _show(progress, task, f"calibrating {config.cluster.name}")
                calibrate(config, session.store, lambda _, task=task: progress.advance(task))
    cells = measured_cells(amount)
    outcomes = [*measure(together(cell.measured.config for cell in cells), session), *predict(cells, session)]
    if amount == "full":
        outcomes += measure([[cell.config] for cell in expand_training("end_to_end")], session)
    return outcomes


def measure(groups: Sequence[Sequence[RunConfig | TrainRunConfig]], session: Session) -> list[Outcome]:
    """Measure what has no record, one group of systems after another and nothing beside, with one progress bar."""
    missing = [group for group in groups if not all(session.store.is_done(config.run_id) for config in group)]
    outcomes: list[Outcome] = []
    with _progress(session.console) as progress:
        task = progress.add_task("measuring", total=sum(num_steps(group[0]) for group in missing))
        for group in groups:
            first = group[0]
            if isinstance(first, RunConfig):
                _show(progress, task, f"{first.model.name}, {first.routing.name}: {len(group)} systems")
            else:
                _show(progress, task, f"training {first.model.name}, {first.system.label}")
            outcomes += execute_together(group, session.store, lambda _: progress.advance(task))
    return outcomes


def predict(cells: Sequence[MeasuredCell], session: Session) -> list[Outcome]:
    """What the calibrated cost model says of the same runs."""
    return simulate_all({"predictions": [cell.predicted for cell in cells]}, session)


def finish(outcomes: Sequence[Outcome], session: Session, wandb_mode: WandbMode, cells: Cells) -> None:
    """Say what was run, write the report, and print the verdicts.

    Raises:
        ValueError: runs that failed.
    """
    console = session.console
    new = [outcome for outcome in outcomes if not outcome.cached]
    kept = len(outcomes) - len(new)
    console.print(f"{len(outcomes)} runs: {len(new)} new, {kept} kept from before ({session.seconds:.0f} s)")
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        console.print(f"[red]failed[/red] {outcome.run_id}: {outcome.reason}")
    verdicts = write(session, cells, "report")
    if new:
        with console.status(f"mirroring verdicts in W&B ({wandb_mode})"):
            mirror_table("verdicts", verdicts, wandb_mode)
    console.print(verdict_summary(verdicts))
    if failed:
        raise ValueError(f"{len(failed)} of {len(outcomes)} runs failed; the report leaves them out and says so")


def write(session: Session, cells: Cells, what: str) -> pd.DataFrame:
    """Write the report from the records that there are, and say where it is.

    Returns:
        The verdicts.
    """
    with session.console.status("drawing figures and writing the report"):
        report = write_report(index_runs(session.store, cells), session.store)
    what = what if report.is_new else f"{what}, of before, as nothing in it has changed"
    session.console.print(f"{what}: [bold]{report.page}[/bold] ({session.seconds:.0f} s since the start)")
    return report.verdicts


def _show(progress: Progress, task: TaskID, what: str) -> None:
    """Say what is being done now; in a file, where no bar moves, as a line of its own."""
    progress.update(task, description=what)
    if not progress.console.is_terminal:
        progress.console.print(what)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)
