"""What ranks are to whoever measures on them, wherever they are."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import pandas as pd

Progress = Callable[[int], None]
Source = Literal["simulated", "local", "emulated", "cluster"]
Device = Literal["cpu", "cuda"]


def no_progress(iteration: int) -> None:
    """Tell nobody."""


class World(Protocol):
    """Ranks that run one function after another, all of them together."""

    @property
    def source(self) -> Source:
        """What records say of numbers that were measured here."""
        ...

    @property
    def device(self) -> Device:
        """Of the tensors that ranks exchange."""
        ...

    @property
    def timeout(self) -> timedelta:
        """Of a collective."""
        ...

    def run(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        progress: Progress = no_progress,
        rows: Path | None = None,
    ) -> pd.DataFrame:
        """Call ``function(rank, *args, folder)`` on all ranks; it makes ``RowStream(folder, rank)`` and writes to it.

        Args:
            function: an importable function.
            args: further arguments.
            progress: called with every iteration that rank 0 has finished.
            rows: folder that the ranks' streams are in and stay in; None for a temporary one.

        Returns:
            The rows of all ranks.

        Raises:
            RunDied: a rank failed; has the rows of the iterations before.
            NotApplicable: a rank raised it.
        """
        ...
