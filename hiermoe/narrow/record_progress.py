"""What rank 0 shows while a recording run trains."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hiermoe.narrow.record_config import RecordConfig

_LINE_EVERY = 20


class RecordProgress:
    """A progress bar on a terminal, a line every 20 steps elsewhere; nothing on ranks other than 0."""

    def __init__(self, rank: int, config: RecordConfig) -> None:
        self._config = config
        self._total = config.train_steps + config.record_steps
        self._console = Console(quiet=rank != 0)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=rank != 0 or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=self._total, state="")
        self._seconds = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, loads: list[float], seconds: float) -> None:
        """Show one finished step.

        Args:
            step: Its number, from 0.
            loss: Mean loss per token.
            loads: Most loaded expert over the mean expert, of every recorded layer.
            seconds: What the step took.
        """
        self._seconds += seconds
        phase = "training" if step < self._config.train_steps else "recording"
        state = f"loss {loss:.3f}  max/mean load {' '.join(f'{load:.2f}' for load in loads)}"
        self._bar.update(self._task, description=phase, completed=step + 1, state=state)
        if not self._console.is_terminal and (step % _LINE_EVERY == 0 or step + 1 == self._total):
            per_step = self._seconds / (step + 1)
            left_minutes = per_step * (self._total - step - 1) / 60
            self._console.print(
                f"{phase} step {step + 1}/{self._total}  {state}  {per_step:.2f} s/step  {left_minutes:.1f} min left",
                highlight=False,
                soft_wrap=True,
            )
