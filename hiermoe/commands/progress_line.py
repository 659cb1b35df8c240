"""Progress that always says what runs, what is left, and where the last whole report is: a bar, or lines in a log."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30.0
NO_REPORT = "none yet"


class ProgressLine:
    """A context for one stage of a command, in which something is done a known number of times.

    On a terminal a bar moves under a line that says what comes after. Elsewhere, as in a log, plain lines say all of
    it: one at the start, one at the end, and between them at most one in `SECONDS_BETWEEN_LINES`.
    """

    def __init__(self, console: Console, what: str, total: int, then: str, report: str) -> None:
        """Prepare.

        Args:
            console: where to.
            what: is done, e.g. simulating.
            total: times that `advance` will be called.
            then: what is left after this stage.
            report: where the last whole report is.
        """
        self._console, self._what, self._total = console, what, total
        self._after = f"then {then} · last whole report: {report}"
        self._detail, self._done = "", 0
        self._started = self._said = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Self:
        self._say(f"{self._what}: {self._total} to do")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._total:
            seconds = time.monotonic() - self._started
            self._console.print(f"{self._what}: {self._done} of {self._total} done in {seconds:.0f} s", markup=False)

    def now(self, detail: str) -> None:
        """Say what of it runs now."""
        self._detail = detail
        self._bar.update(self._task, description=f"{self._what} {detail}")
        self._line()

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        self._bar.advance(self._task)
        self._line()

    def _line(self) -> None:
        if self._console.is_terminal or time.monotonic() - self._said < SECONDS_BETWEEN_LINES:
            return
        spent = time.monotonic() - self._started
        left = f", about {spent / self._done * (self._total - self._done):.0f} s left" if self._done else ""
        self._say(f"{' '.join(filter(None, [self._what, self._detail]))}: {self._done} of {self._total}{left}")

    def _say(self, what: str) -> None:
        self._said = time.monotonic()
        self._console.print(f"{what} · {self._after}", markup=False, highlight=False, soft_wrap=True)
