"""What ``make reproduce`` does: the paper's sweeps in simulation, measured ones where that is possible, the report."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console

from hiermoe.analysis.claims import load_rules
from hiermoe.analysis.report import write_report
from hiermoe.analysis.verdicts import verdict_summary
from hiermoe.commands.progress_line import NO_REPORT, ProgressLine
from hiermoe.commands.records_command import print_damaged, print_stale
from hiermoe.megatron.checkpoint_folder import newest_first
from hiermoe.narrow.record import record
from hiermoe.ranks.emulated.requirements import missing_requirement
from hiermoe.ranks.server import RankFailedError
from hiermoe.records.index import REAL_MODELS
from hiermoe.records.keep import Outcome
from hiermoe.records.project import REPORTS, in_workplace
from hiermoe.records.store import RunStore
from hiermoe.runs.calibration import calibrate, calibration_config
from hiermoe.runs.compose import Cell, expand, sweep_names
from hiermoe.runs.execute import execute_together, num_steps
from hiermoe.runs.indexing import index_runs
from hiermoe.runs.measured_cells import Amount, MeasuredCell, clusters_of, measured_cells, together
from hiermoe.runs.routings import names_over_places, sweeps_over_places
from hiermoe.runs.run_config import RunConfig, WandbMode
from hiermoe.runs.stale import stale_in_place_of
from hiermoe.runs.sweep import run_all
from hiermoe.runs.tracking import mirror_table
from hiermoe.runs.training import TrainRunConfig, expand_training, model_of_whole_steps, trained_together

Cells = Mapping[str, Sequence[Cell]]


@dataclass
class Session:
    """What all parts of one reproduction share."""

    store: RunStore
    console: Console
    workers: int
    started: float
    report: Path = REPORTS / "report.html"

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.started

    def stage(self, what: str, total: int, then: str) -> ProgressLine:
        """Progress of a part."""
        return ProgressLine(self.console, what, total, then, str(self.report) if self.report.exists() else NO_REPORT)


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
        finish(simulate_all(cells, session, "the report"), session, wandb_mode, cells)
        return
    lacking = missing_requirement()
    console.print(PLANS["simulated" if lacking else amount])
    judged = simulated_sweeps("default")
    beyond = {name: sweep for name, sweep in cells.items() if name not in judged}
    left = (
        "first report, " + ("" if lacking else "measured runs, ") + ("what lies beyond the paper, " if beyond else "")
    )
    outcomes = simulate_all({name: sweep for name, sweep in cells.items() if name in judged}, session, f"{left}report")
    if any(not outcome.cached for outcome in outcomes):
        write(session, cells, "first report, all simulated verdicts")
    if lacking is None:
        outcomes += measure_emulated(amount, session)
    else:
        console.print(
            f"[yellow]left out[/yellow]: measured runs on an emulated cluster. {lacking}\n"
            "  as root: [bold]make reproduce[/bold]; what is done is kept"
        )
    outcomes += simulate_all(beyond, session, "report")
    if amount != "quick":
        cells |= sweeps_over_places()
        outcomes += simulate_over_places(cells, session, beyond=amount == "full")
    finish(outcomes, session, wandb_mode, cells)


PLANS: Mapping[str, str] = {
    "simulated": "simulation of all that the paper claims",
    "quick": "simulation of the paper's figures and tables and a first report, then a first look at measured numbers "
    "on 8 emulated ranks: about 5 minutes on two cores",
    "default": "simulation of all that the paper claims and a first report, then on 32 emulated ranks calibration and "
    "Fig. 11 of one model: 7 to 13 minutes on two cores (QUICK=1: 5, FULL=1: two hours). Stop and go on as you like",
    "full": "simulation of all that the paper claims and a first report, then on 32 emulated ranks calibration, Fig. "
    "11 of both models, Fig. 13, Table IV (K), update frequency, searched placements, systems with copies or chunks, "
    "and whole training steps, then what lies beyond the paper: some two hours on two cores. Stop and go on as "
    "you like",
}


def simulated_sweeps(amount: Amount) -> list[str]:
    """Names of an amount's sweeps: those of the paper's figures and tables, of all its claims, or all there are."""
    if amount == "full":
        return sweep_names()
    places = load_rules().sweeps.items()
    return sorted({name for place, name in places if amount == "default" or place.startswith(("Fig.", "Table"))})


def simulate_all(cells: Cells, session: Session, then: str = "report") -> list[Outcome]:
    """Run simulated sweeps on all cores; ``then`` is what the command has left after them."""
    if not cells:
        return []
    configs = {cell.run_id: cell.config for sweep in cells.values() for cell in sweep}
    sweep_of = {cell.run_id: name for name, sweep in cells.items() for cell in sweep}
    with session.stage("simulating", len(configs), then) as progress:

        def finished(outcome: Outcome) -> None:
            progress.now(sweep_of[outcome.run_id])
            progress.advance()

        return run_all(configs.values(), session.workers, finished, session.store)


def simulate_over_places(cells: Cells, session: Session, beyond: bool) -> list[Outcome]:
    """What the paper claims, or with what lies beyond it, layer after layer: recorded, and of real models if here."""
    cells = {name: cells[name] for name in names_over_places(beyond)}
    if not any(sweep for name, sweep in cells.items() if name.endswith(REAL_MODELS)):
        session.console.print(
            "left out: routing of real models. [bold]hiermoe trace fetch deepseek_v2_lite_law[/bold] brings it (git); "
            "this command then adds it"
        )
    return simulate_all(cells, session)


def measure_emulated(amount: Amount, session: Session) -> list[Outcome]:
    """Calibrate the emulated clusters of an amount unless that is done, then measure."""
    for name in clusters_of(amount):
        config = calibration_config(name.removesuffix("_calibrated"), "emulated")
        if not (session.store.is_done(config.run_id) and config.path.exists()):
            what = f"calibrating {config.cluster.name}"
            with session.stage(what, num_steps(config), "measured runs, report") as progress:
                calibrate(config, session.store, lambda _, progress=progress: progress.advance())
    cells = measured_cells(amount)
    outcomes = [*measure(together(cell.measured.config for cell in cells), session), *predict(cells, session)]
    if amount == "full":
        train_routers(session)
        outcomes += measure(trained_together([cell.config for cell in expand_training("end_to_end")]), session)
    return outcomes


def train_routers(session: Session) -> None:
    """The model that whole steps begin with, unless it is there.

    Raises:
        ValueError: its training failed; records of everything before it are kept.
    """
    config = model_of_whole_steps()
    if not newest_first(in_workplace(str(config.model_output))):
        session.console.print(f"training {config.model.name}, whose whole steps are measured then: some ten minutes")
        try:
            record(config, "hiermoe record +recording=for_whole_steps")
        except RankFailedError as error:
            raise ValueError(f"training {config.model.name} for whole steps: {error}") from error


def measure(groups: Sequence[Sequence[RunConfig | TrainRunConfig]], session: Session) -> list[Outcome]:
    """Measure what has no record, one group of systems after another and nothing beside, with one progress bar."""
    missing = [group for group in groups if not all(session.store.is_done(config.run_id) for config in group)]
    outcomes: list[Outcome] = []
    steps = sum(num_steps(group[0]) for group in missing)
    with session.stage("measuring", steps, "what is predicted of these runs, report") as progress:
        for group in groups:
            first = group[0]
            if isinstance(first, RunConfig):
                progress.now(f"{first.model.name}, {first.routing.name}, {len(group)} systems")
            else:
                progress.now(f"training {first.model.name}, {len(group)} systems")
            outcomes += execute_together(group, session.store, lambda _: progress.advance())
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
        index = index_runs(session.store, cells)
        stale = stale_in_place_of(index, session.store)
        report = write_report(index, session.store, stale=stale)
    print_stale(stale, session.console)
    print_damaged(report.damaged, session.console)
    what = what if report.is_new else f"{what}, of before, as nothing in it has changed"
    session.console.print(
        f"{what}: [bold]{report.page}[/bold] ({session.seconds:.0f} s since the start)", soft_wrap=True
    )
    return report.verdicts
