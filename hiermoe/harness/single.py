"""One run from the command line: progress, a summary for the eye, a mirror in W&B."""

import sys

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hiermoe.harness.config import RunConfig, parse
from hiermoe.harness.run import execute
from hiermoe.harness.tracking import mirror_run
from hiermoe.records.store import RunStore


def run_and_print(composed: DictConfig) -> None:
    """Run a composed configuration and print what came out.

    Raises:
        ValueError: the run does not apply or failed; its record has the reason too.
    """
    torch.set_num_threads(1)
    config, store, console = parse(composed), RunStore(), Console()
    title = f"{config.system.label} · {config.model.name} · {config.cluster.name} · {config.routing.name}"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=config.iterations)
        outcome = execute(config, store, lambda _: progress.advance(task))
    if outcome.status == "not_applicable" and composed_by_sweep():
        console.print(f"[yellow]not applicable[/yellow] {title}: {outcome.reason}")
        return
    if outcome.status != "ok":
        raise ValueError(outcome.reason)
    console.print(_summary(config, store, outcome.run_id, title))
    where = store.path(outcome.run_id)
    console.print(f"{'kept from before' if outcome.cached else f'{outcome.seconds:.1f} s'} · record: {where}\n")
    if not outcome.cached:
        mirror_run(config, store.read(outcome.run_id))


def composed_by_sweep() -> bool:
    """Whether Hydra runs several configurations, so that one without meaning must not end the others."""
    return bool({"-m", "--multirun"} & set(sys.argv))


def _summary(config: RunConfig, store: RunStore, run_id: str, title: str) -> Table:
    records = store.read(run_id)
    counted = records[records["measured"]]
    steps = counted[counted["phase"] == "step"]
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="cyan")
    table.add_column(justify="right")
    first, last = steps["iteration"].min(), steps["iteration"].max()
    table.add_row("AlltoAll per step and layer (predicted)", f"{steps['predicted_ms'].mean():.2f} ms")
    table.add_row("counted iterations", f"{first}-{last} of {config.iterations}")
    dimensions = steps["dimension"].astype(int).value_counts()
    table.add_row("dimension d", ", ".join(f"{d} ({n / len(steps):.0%})" for d, n in dimensions.items()))
    for stage, rows in counted[counted["phase"] == "dispatch"].groupby("stage"):
        table.add_row(f"stage {stage}", f"{rows['predicted_ms'].mean():.2f} ms, {rows['bytes'].mean() / 1e6:.1f} MB")
    for level, rows in counted[counted["phase"] == "routing"].groupby("stage", sort=False):
        table.add_row(f"duplication per {level}", f"{1 - rows['rows'].sum() / rows['pairs'].sum():.1%}")
    table.add_row(
        "busiest GPU's expert rows / mean", f"{(steps['expert_rows_max'] / steps['expert_rows_mean']).mean():.2f}"
    )
    if steps["dropped_pairs"].any():
        table.add_row("dropped pairs", f"{steps['dropped_pairs'].sum() / steps['pairs'].sum():.1%}")
    every_step = records[records["phase"] == "step"]
    if every_step["moved_experts"].any():
        table.add_row("experts moved", f"{every_step['moved_experts'].sum():.0f} in {config.iterations} iterations")
    return table
