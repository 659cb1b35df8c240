"""How far a recording is: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hiermoe.narrow.record_config import RecordConfig

SHOWN_EVERY = 50  # steps: loads, and all of it where there is no terminal for a bar


@contextmanager
def recording_progress(
    rank: int, config: RecordConfig, start: int
) -> Iterator[Callable[[int, float, np.ndarray | None], None]]:
    """Progress of a recording, shown by rank 0.

    Args:
        rank: Of this process.
        config: The run.
        start: Steps that an earlier run has finished.

    Yields:
        Shows one finished step, given its number (from 0), the mean loss per token, and the most loaded expert over the
        mean expert of every recorded layer, by the tokens of this rank; None for those of an earlier step.
    """
    console = Console(quiet=rank != 0)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=rank != 0 or not console.is_terminal,
    )
    task = bar.add_task("training", total=config.last_step, completed=start, state="")
    if start:
        console.print(f"going on after step {start}, from the checkpoint of an earlier run", highlight=False)
    began, load_state = time.perf_counter(), ""

    def update(step: int, loss: float, loads: np.ndarray | None) -> None:
        nonlocal load_state
        per_step = (time.perf_counter() - began) / (step + 1 - start)
        stage = config.stage_at(step)
        phase = "training" if stage is None else f"recording {stage}"
        if loads is not None:
            load_state = f"max/mean load {' '.join(f'{load:.2f}' for load in loads)}"
        state = f"loss {loss:.3f}  {load_state}"
        bar.update(task, description=phase, completed=step + 1, state=state)
        if not console.is_terminal and (step % SHOWN_EVERY == 0 or step + 1 == config.last_step):
            left_minutes = per_step * (config.last_step - step - 1) / 60
            console.print(
                f"{phase} step {step + 1}/{config.last_step}  {state}  {per_step:.2f} s/step, "
                f"{config.tokens_per_step / per_step:.0f} tokens/s  {left_minutes:.1f} min left",
                highlight=False,
                soft_wrap=True,
            )

    with bar:
        yield update
