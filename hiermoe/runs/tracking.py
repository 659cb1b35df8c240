"""W&B mirrors what the records say. Offline by default; files are the truth and nothing reads W&B."""

import sys
from collections.abc import Callable
from typing import Any, Protocol

import pandas as pd

from hiermoe.records.project import WORKPLACE
from hiermoe.runs.measurable import Measurable
from hiermoe.runs.run_config import WandbConfig, WandbMode


class Mirrored(Measurable, Protocol):
    """A run that W&B mirrors."""

    @property
    def wandb(self) -> WandbConfig:
        """Whether and where."""
        ...


def mirror_run(config: Mirrored, records: pd.DataFrame) -> None:
    """Log a run's step rows, one W&B step an iteration; of several ranks the largest number."""

    def fill(run: Any) -> None:
        rows = records[records["phase"].isin(("step", "train"))].select_dtypes("number").dropna(axis=1)
        steps = rows.groupby("iteration", as_index=False).max()
        for row in steps.to_dict("records"):
            run.log({str(key): value for key, value in row.items()}, step=int(row["iteration"]))

    _mirror(config.run_id, config.wandb, fill, config.content)


def mirror_table(name: str, table: pd.DataFrame, mode: WandbMode) -> None:
    """Log a table, e.g. the verdicts, as a run of its own."""

    def fill(run: Any) -> None:
        import wandb

        run.log({name: wandb.Table(dataframe=table.astype(str))})

    _mirror(name, WandbConfig(mode=mode, project="hiermoe"), fill)


def _mirror(name: str, config: WandbConfig, fill: Callable[[Any], None], content: dict[str, Any] | None = None) -> None:
    """Make a run in W&B. Nothing depends on it: where W&B fails, a line says so and that is all."""
    if config.mode == "disabled":
        return
    try:
        import wandb  # seconds to import; most commands never need it

        settings = wandb.Settings(silent=True)
        run = wandb.init(
            project=config.project, mode=config.mode, dir=WORKPLACE, name=name, config=content, settings=settings
        )
        fill(run)
        run.finish()
    except Exception as error:  # of any kind: no home, no network, no disk, no W&B
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"W&B has no copy of {name} ({reason}); what is in results/ is whole", file=sys.stderr)
