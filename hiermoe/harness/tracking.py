"""W&B mirrors what the records say. Offline by default; files are the truth and nothing reads W&B."""

import pandas as pd

from hiermoe.harness.config import RunConfig, WandbMode
from hiermoe.records.project import PROJECT_ROOT


def mirror_run(config: RunConfig, records: pd.DataFrame) -> None:
    """Log a run's step rows, one W&B step an iteration."""
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
    steps = records[records["phase"] == "step"].select_dtypes("number").dropna(axis=1)
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
