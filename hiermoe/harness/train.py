"""`hiermoe train`: train a model under one system on this machine's ranks, as a record."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from pydantic import Field, PositiveFloat, model_validator

from hiermoe.backends.training import TrainingJob, run_training
from hiermoe.harness.config import WandbConfig, parse
from hiermoe.harness.run import Outcome, keep_record
from hiermoe.harness.single import present
from hiermoe.harness.summary import train_summary
from hiermoe.harness.sweep import Cell, expand_file
from hiermoe.megatron.corpus import corpus_key
from hiermoe.megatron.training_config import TrainingConfig
from hiermoe.planner.system import SystemConfig
from hiermoe.records.project import SWEEPS
from hiermoe.records.run_id import run_id
from hiermoe.records.store import RunStore
from hiermoe.topology.cluster import Cluster


class TrainRunConfig(TrainingConfig):
    """One training run; the schema of conf/train.yaml, which names `world_size` in the place of `ep_size`.

    Attributes:
        system: What moves tokens.
        cluster: Hierarchy and constants, of `ep_size` GPUs.
        steps: Of the optimizer.
        timeout_minutes: A rank that waits longer than this for another one ends the run.
        wandb: Mirror of the record.
    """

    system: SystemConfig
    cluster: Cluster
    steps: int = Field(ge=2)
    timeout_minutes: PositiveFloat
    wandb: WandbConfig

    @model_validator(mode="before")
    @classmethod
    def _spread_ranks(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Ranks are split into replicas, and the cluster is cut down to one of them."""
        values = dict(values)
        world_size, replicas = int(values.pop("world_size")), int(values["data_parallel"])
        if world_size < 1 or replicas < 1 or world_size % replicas:
            raise ValueError(f"world_size={world_size} does not split into data_parallel={replicas} replicas")
        ep_size = world_size // replicas
        return values | {"ep_size": ep_size, "cluster": Cluster.model_validate(values["cluster"]).reduced(ep_size)}

    @property
    def content(self) -> dict[str, Any]:
        """Everything that may change a number, as JSON-ready values."""
        return self.model_dump(mode="json", exclude={"wandb", "cache_dir"}) | {"corpus": corpus_key(self)}

    @property
    def run_id(self) -> str:
        """The name of the run, by its content."""
        return run_id(self.content, measured=True)


def expand_training(name: str) -> list[Cell["TrainRunConfig"]]:
    """All runs of sweeps/train/<name>.yaml, as ``hiermoe train -m +sweeps/train=<name>`` would run them."""
    return expand_file(SWEEPS / "train" / f"{name}.yaml", "train", TrainRunConfig)


def train_and_print(composed: DictConfig) -> None:
    """Run a composed configuration and print what came out.

    Raises:
        ValueError: the run does not apply or failed; its record has the reason too.
    """
    config = parse(composed, TrainRunConfig)
    title = f"{config.system.label} · {config.model.name} · {config.cluster.name} · {config.dtype}"
    if config.data_parallel > 1:
        title += f" · {config.data_parallel} replicas"

    def run(store: RunStore, progress: Callable[[int], None]) -> Outcome:
        return execute_training(config, store, progress)

    present(config, title, config.steps, run, train_summary)


def execute_training(
    config: TrainRunConfig, store: RunStore, progress: Callable[[int], None] = lambda step: None
) -> Outcome:
    """Train unless the record is there, and store the record.

    Args:
        config: what to run.
        store: where records are.
        progress: called with the number of every finished step.

    Returns:
        The outcome. A run whose ranks failed keeps the rows of the steps that all of them finished.
    """
    keys = {
        "source": "local",
        "system": config.system.name,
        "model": config.model.name,
        "cluster": config.cluster.name,
        "routing": "trained",
        "seed": config.seed,
        "num_experts": config.model.num_experts,
        "topk": config.model.topk,
        "num_ranks": config.world_size,
        "tokens_per_rank": config.sequences_per_rank * config.seq_length,
    }
    job = TrainingJob(
        training=config,
        system=config.system,
        cluster=config.cluster,
        steps=config.steps,
        timeout=timedelta(minutes=config.timeout_minutes),
    )

    def measure() -> pd.DataFrame:
        return run_training(job, progress)

    return keep_record(config.run_id, config.content, keys, measure, store)
