"""One run from the command line: progress, a summary for the eye, a mirror in W&B."""

import sys
from collections.abc import Callable

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hiermoe.ranks.crew import Crew
from hiermoe.ranks.world import World
from hiermoe.records.store import RunStore
from hiermoe.runs.execute import execute, num_steps
from hiermoe.runs.run_config import RunConfig
from hiermoe.runs.summary import summary
from hiermoe.runs.tracking import Mirrored, mirror_run


def run_and_print(config: RunConfig) -> None:
    """Run and print what came out.

    Raises:
        ValueError: the run does not apply or failed; its record has the reason too.
    """
    parts = [config.measure if config.system is None else config.system.label]
    parts += [part.name for part in (config.model, config.cluster, config.routing) if part is not None]
    present(config, " · ".join(parts), summary)


def present(config: Mirrored, title: str, summarise: Callable[[pd.DataFrame, str], Table]) -> None:
    """Run something that leaves a record, with progress, and print and mirror what came out.

    Every process of an allocation calls it, where the ranks are one's; rank 0 alone prints.

    Args:
        config: what runs.
        title: of progress and summary.
        summarise: makes a table of the record, under the title.

    Raises:
        ValueError: the run does not apply or failed; its record has the reason too.
    """
    num_ranks = config.cluster.hierarchy.num_ranks * config.ep_groups

    def check(crew: Crew) -> None:
        if crew.world_size != num_ranks:
            raise ValueError(f"the run has {num_ranks} ranks, but the allocation {crew.world_size} processes")

    def program(world: World | None) -> None:
        torch.set_num_threads(1)
        store, console = RunStore(), Console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(title, total=num_steps(config))
            outcome = execute(config, store, lambda _: progress.advance(task), world)
        swept = {"-m", "--multirun"} & set(sys.argv)  # one without meaning must not end the others
        if outcome.status == "not_applicable" and swept:
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

    if config.ranks is None:
        program(None)
    else:
        config.ranks.lead(program, check)
