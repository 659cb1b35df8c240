"""Runs from the command line: progress, a summary for the eye, a mirror in W&B."""

import os
import sys
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hiermoe.ranks.crew import Crew
from hiermoe.ranks.world import World
from hiermoe.records.keep import Outcome
from hiermoe.records.store import RunStore
from hiermoe.runs.execute import execute_together, num_steps
from hiermoe.runs.run_config import RunConfig
from hiermoe.runs.summary import summary
from hiermoe.runs.sweep import run_all
from hiermoe.runs.tracking import Mirrored, mirror_run


def run_and_print(*configs: RunConfig) -> None:
    """Run and print what came out.

    Args:
        configs: one, or several that differ in their system alone: these are measured interleaved, on the same ranks.

    Raises:
        ValueError: one failed, or under no ``-m`` does not apply; its record has the reason too.
    """
    present(configs, [_title(config) for config in configs], summary)


def simulate_and_print(*configs: RunConfig) -> None:
    """Run what needs no ranks, on all cores, and print what comes out as it comes.

    Raises:
        ValueError: a worker was killed; runs that fail are only printed.
    """
    store, console = RunStore(), Console()
    by_id = {config.run_id: config for config in configs}
    with _progress(console) as progress:
        task = progress.add_task("runs", total=len(by_id))

        def finished(outcome: Outcome) -> None:
            progress.advance(task)
            config = by_id[outcome.run_id]
            _print_outcome(config, _title(config), outcome, store, console, summary)

        run_all(configs, os.cpu_count() or 1, finished, store)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def _title(config: RunConfig) -> str:
    parts = [config.measure if config.system is None else config.system.label]
    parts += [part.name for part in (config.model, config.cluster, config.routing) if part is not None]
    return " · ".join(parts)


def present(
    configs: Sequence[Mirrored], titles: Sequence[str], summarise: Callable[[pd.DataFrame, str], Table]
) -> None:
    """Run something that leaves records, with progress, and print and mirror what came out.

    Every process of an allocation calls it, where the ranks are one's; rank 0 alone prints.

    Args:
        configs: what runs: one, or several that differ in their system alone.
        titles: of progress and summary, one each.
        summarise: makes a table of a record, under its title.

    Raises:
        ValueError: one failed, or under no ``-m`` does not apply; its record has the reason too.
    """
    first = configs[0]
    num_ranks = first.cluster.hierarchy.num_ranks * first.ep_groups

    def check(crew: Crew) -> None:
        if crew.world_size != num_ranks:
            raise ValueError(f"the run has {num_ranks} ranks, but the allocation {crew.world_size} processes")

    def program(world: World | None) -> None:
        torch.set_num_threads(1)
        store, console = RunStore(), Console()
        with _progress(console) as progress:
            title = titles[0] if len(titles) == 1 else f"{len(titles)} systems interleaved, {titles[0]} first"
            task = progress.add_task(title, total=max(map(num_steps, configs)))
            outcomes = execute_together(configs, store, lambda _: progress.advance(task), world)
        alone = not {"-m", "--multirun"} & set(sys.argv)
        for config, title, outcome in zip(configs, titles, outcomes, strict=True):
            if not alone or outcome.status == "ok":
                _print_outcome(config, title, outcome, store, console, summarise)
        for outcome in outcomes:
            if outcome.status == "failed" or (alone and outcome.status != "ok"):
                raise ValueError(outcome.reason)

    if first.ranks is None:
        program(None)
    else:
        first.ranks.lead(program, check)


def _print_outcome(
    config: Mirrored,
    title: str,
    outcome: Outcome,
    store: RunStore,
    console: Console,
    summarise: Callable[[pd.DataFrame, str], Table],
) -> None:
    if outcome.status != "ok":
        how = "[red]failed[/red]" if outcome.status == "failed" else "[yellow]not applicable[/yellow]"
        console.print(f"{how} {title}: {escape(outcome.reason)}", soft_wrap=True)
        return
    records = store.read(outcome.run_id)
    console.print(summarise(records, title))
    where = store.path(outcome.run_id)
    console.print(f"{'kept from before' if outcome.cached else f'{outcome.seconds:.1f} s'} · record: {where}\n")
    if not outcome.cached:
        mirror_run(config, records)
