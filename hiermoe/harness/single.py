"""One run from the command line: progress, a summary for the eye, a mirror in W&B."""

import sys

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hiermoe.harness.config import parse
from hiermoe.harness.run import execute
from hiermoe.harness.summary import summary
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
    console.print(summary(store.read(outcome.run_id), title))
    where = store.path(outcome.run_id)
    console.print(f"{'kept from before' if outcome.cached else f'{outcome.seconds:.1f} s'} · record: {where}\n")
    if not outcome.cached:
        mirror_run(config, store.read(outcome.run_id))


def composed_by_sweep() -> bool:
    """Whether Hydra runs several configurations, so that one without meaning must not end the others."""
    return bool({"-m", "--multirun"} & set(sys.argv))
