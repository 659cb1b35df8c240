"""All sweeps of the paper on all cores, then the report: what ``make reproduce`` does."""

import os
import time
from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hiermoe.analysis.report import write_report
from hiermoe.analysis.verdicts import verdict_summary
from hiermoe.harness.config import WandbMode
from hiermoe.harness.run import Outcome
from hiermoe.harness.sweep import Cell, expand, run_all, sweep_names
from hiermoe.harness.tracking import mirror_table
from hiermoe.records.store import RunStore


def reproduce(
    sweeps: Iterable[str] | None = None, workers: int | None = None, wandb_mode: WandbMode = "offline"
) -> None:
    """Run what has no record yet, write the report, and print the verdicts.

    Args:
        sweeps: names; None for all. The report covers all of them, with what records there are.
        workers: processes; None for one a core.
        wandb_mode: how the verdicts are mirrored in W&B, if any run is new.

    Raises:
        ValueError: an unknown sweep, or runs that failed; the report is written before that.
    """
    console, store, started = Console(), RunStore(), time.perf_counter()
    names = list(sweeps) if sweeps else sweep_names()
    workers = workers or os.cpu_count() or 1
    with console.status("reading conf/ and sweeps/"):
        cells = {name: expand(name) for name in sweep_names() if name in names or sweeps is None}
        unknown = set(names) - set(cells)
    if unknown:
        raise ValueError(f"sweep {sorted(unknown)[0]!r} is unknown; choose from {', '.join(sweep_names())}")
    outcomes = _run(cells, workers, store, console)
    new = [outcome for outcome in outcomes if not outcome.cached]
    console.print(
        f"{len(outcomes)} runs: {len(new)} new, {len(outcomes) - len(new)} kept from before "
        f"({time.perf_counter() - started:.0f} s on {workers} processes)"
    )
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        console.print(f"[red]failed[/red] {outcome.run_id}: {outcome.reason}")
    with console.status("drawing figures and writing the report"):
        report, verdicts = write_report(cells)
    if new:
        with console.status(f"mirroring verdicts in W&B ({wandb_mode})"):
            mirror_table("verdicts", verdicts, wandb_mode)
    console.print(verdict_summary(verdicts))
    console.print(f"report: [bold]{report}[/bold] ({time.perf_counter() - started:.0f} s in all)")
    if failed:
        raise ValueError(f"{len(failed)} of {len(outcomes)} runs failed; the report leaves them out and says so")


def _run(cells: dict[str, list[Cell]], workers: int, store: RunStore, console: Console) -> list[Outcome]:
    """Run all cells with one progress bar per sweep."""
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        runs = {name: {cell.config.run_id for cell in sweep} for name, sweep in cells.items()}
        total = progress.add_task("all runs", total=len(set().union(*runs.values())))
        tasks = {name: progress.add_task(name, total=len(ids)) for name, ids in runs.items()}

        def finished(outcome: Outcome) -> None:
            progress.advance(total)
            for name, ids in runs.items():
                if outcome.run_id in ids:
                    progress.advance(tasks[name])

        return run_all((cell.config for sweep in cells.values() for cell in sweep), workers, finished, store)
