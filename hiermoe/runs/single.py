"""One run from the command line: progress, a summary for the eye, a mirror in W&B."""

import sys
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hiermoe.records.store import RunStore
from hiermoe.runs.execute import Outcome, execute
from hiermoe.runs.run_config import RunConfig
from hiermoe.runs.summary import summary
from hiermoe.runs.tracking import Mirrored, mirror_run


def run_and_print(config: RunConfig) -> None:
    """Run and print what came out.

    Raises:
        ValueError: the run does not apply or failed; its record has the reason too.
    """
    title = f"{config.system.label} · {config.model.name} · {config.cluster.name} · {config.routing.name}"
    present(config, title, config.num_steps, partial(execute, config), summary)


def present(
    config: Mirrored,
    title: str,
    iterations: int,
    run: Callable[[RunStore, Callable[[int], None]], Outcome],
    summarise: Callable[[pd.DataFrame, str], Table],
) -> None:
    """Run something that leaves a record, with progress, and print and mirror what came out.

    Args:
        config: what runs.
        title: of progress and summary.
        iterations: how many there will be.
        run: takes the store and what to call with every finished iteration.
        summarise: makes a table of the record, under the title.

    Raises:
        ValueError: the run does not apply or failed; its record has the reason too.
    """
    torch.set_num_threads(1)
    store, console = RunStore(), Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=iterations)
        outcome = run(store, lambda _: progress.advance(task))
    if outcome.status == "not_applicable" and composed_by_sweep():
        console.print(f"[yellow]not applicable[/yellow] {title}: {outcome.reason}")
        return
    if outcome.status != "ok":
        raise ValueError(outcome.reason)
    records = store.read(outcome.run_id)
    console.print(summarise(records, title))
    where = store.path(outcome.run_id)
    console.print(f"{'kept from before' if outcome.cached else f'{outcome.seconds:.1f} s'} · record: {where}\n")
    if not outcome.cached:
        mirror_run(config, records)


def composed_by_sweep() -> bool:
    """Whether Hydra runs several configurations, so that one without meaning must not end the others."""
    return bool({"-m", "--multirun"} & set(sys.argv))
