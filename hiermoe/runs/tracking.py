"""W&B mirrors what the records say. Offline by default; files are the truth and nothing reads W&B."""

from typing import Protocol

import pandas as pd

from hiermoe.records.project import PROJECT_ROOT
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
    if config.wandb.mode == "disabled":
        return
    import wandb  # seconds to import; most commands never need it

    run = wandb.init(
        project=config.wandb.project,
        mode=config.wandb.mode,
        dir=PROJECT_ROOT,
        name=config.run_id,
        config=config.content,
        settings=wandb.Settings(silent=True),
    )
    rows = records[records["phase"].isin(("step", "train"))].select_dtypes("number").dropna(axis=1)
    steps = rows.groupby("iteration", as_index=False).max()
    for row in steps.to_dict("records"):
        run.log({str(key): value for key, value in row.items()}, step=int(row["iteration"]))
    run.finish()


def mirror_table(name: str, table: pd.DataFrame, mode: WandbMode) -> None:
    """Log a table, e.g. the verdicts, as a run of its own."""
    if mode == "disabled":
        return
    import wandb

    settings = wandb.Settings(silent=True)
    run = wandb.init(project="hiermoe", mode=mode, dir=PROJECT_ROOT, name=name, settings=settings)
    run.log({name: wandb.Table(dataframe=table.astype(str))})
    run.finish()
