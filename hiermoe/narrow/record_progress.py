"""What rank 0 shows while a recording run trains."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hiermoe.narrow.record_config import RecordConfig

_LINE_EVERY = 20


@contextmanager
def record_progress(rank: int, config: RecordConfig) -> Iterator[Callable[[int, float, list[float], float], None]]:
    """A progress bar on a terminal, a line every 20 steps elsewhere; nothing on ranks other than 0.

    Yields:
        Shows one finished step, given its number (from 0), the mean loss per token, the most loaded expert over the
        mean expert of every recorded layer, and the seconds that the step took.
    """
    total, so_far = config.train_steps + config.record_steps, 0.0
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
    task = bar.add_task("training", total=total, state="")

    def update(step: int, loss: float, loads: list[float], seconds: float) -> None:
        nonlocal so_far
        so_far += seconds
        phase = "training" if step < config.train_steps else "recording"
        state = f"loss {loss:.3f}  max/mean load {' '.join(f'{load:.2f}' for load in loads)}"
        bar.update(task, description=phase, completed=step + 1, state=state)
        if not console.is_terminal and (step % _LINE_EVERY == 0 or step + 1 == total):
            per_step = so_far / (step + 1)
            left_minutes = per_step * (total - step - 1) / 60
            console.print(
                f"{phase} step {step + 1}/{total}  {state}  {per_step:.2f} s/step  {left_minutes:.1f} min left",
                highlight=False,
                soft_wrap=True,
            )

    with bar:
        yield update
