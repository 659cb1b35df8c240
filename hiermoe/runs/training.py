"""`hiermoe train`: train a model under one system, as a record."""

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import pandas as pd
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from hiermoe.measure.train import Checkpoints, TrainingJob, run_training
from hiermoe.megatron.checkpoint_folder import finished_steps, latest_checkpoint
from hiermoe.narrow.corpus import corpus_key
from hiermoe.narrow.training_config import TrainingConfig
from hiermoe.policies.system import SystemConfig
from hiermoe.ranks.crew import Crew, CrewEnded, leave
from hiermoe.ranks.streams import has_iterations
from hiermoe.ranks.worlds import World
from hiermoe.records.project import SCRATCH, SWEEPS, from_root, to_root
from hiermoe.records.run_id import run_id
from hiermoe.records.store import RunStore
from hiermoe.runs.compose import Cell, expand_file
from hiermoe.runs.execute import Outcome, keep_record
from hiermoe.runs.measured_cells import allocations_so_far
from hiermoe.runs.run_config import BackendConfig, WandbConfig
from hiermoe.runs.single import present
from hiermoe.runs.summary import train_summary
from hiermoe.topology.cluster import Cluster

_NO_CONTENT = {"wandb", "cache_dir", "checkpoint_every", "checkpoint_keep", "checkpoint_dir", "resume"}


class TrainRunConfig(TrainingConfig):
    """One training run; the schema of conf/train.yaml, which names `world_size` in the place of `ep_size`.

    Attributes:
        system: What moves tokens.
        cluster: Hierarchy and constants, of `ep_size` GPUs.
        backend: local; emulated: with links as slow as the cluster says; torchrun: the processes of an allocation.
        steps: Of the optimizer.
        timeout_minutes: A rank that waits longer than this for another one ends the run.
        checkpoint_every: Steps between two checkpoints; None for no checkpoints.
        checkpoint_keep: So many of the newest checkpoints stay; None for all.
        checkpoint_dir: Folder of all runs' checkpoints, each run's in a folder of its name.
        resume: ``latest``: this run goes on from its own newest checkpoint, if it has one. A path: likewise, and from
            this checkpoint, whichever system wrote it, if it has none. None: from the beginning.
        wandb: Mirror of the record.
    """

    system: SystemConfig
    cluster: Cluster
    backend: BackendConfig
    steps: int = Field(ge=2)
    timeout_minutes: PositiveFloat
    checkpoint_every: PositiveInt | None
    checkpoint_keep: PositiveInt | None
    checkpoint_dir: str
    resume: str | None
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
        return self.model_dump(mode="json", exclude=_NO_CONTENT) | {"corpus": corpus_key(self)}

    @property
    def run_id(self) -> str:
        """The name of the run, by its content and, if it starts from a checkpoint of another run, by that."""
        given = self.given_checkpoint
        files = () if given is None else tuple(path for path in sorted(given.rglob("*")) if path.is_file())
        return run_id(
            self.content,
            ("hiermoe.measure.train", "hiermoe.ranks.worlds", "hiermoe.ranks.crew"),
            files,
            on_this_host=self.backend.on_this_host,
        )

    @property
    def given_checkpoint(self) -> Path | None:
        """What `resume` names."""
        return None if self.resume in (None, "latest") else from_root(self.resume)

    @model_validator(mode="after")
    def _check_backend(self) -> Self:
        if not self.backend.starts_ranks:
            raise ValueError(f"backend={self.backend.name} trains nothing; choose from local, emulated, torchrun")
        return self

    @model_validator(mode="after")
    def _check_given_checkpoint(self) -> Self:
        if self.given_checkpoint is not None:
            finished = finished_steps(self.given_checkpoint)
            if finished >= self.steps:
                raise ValueError(f"steps={self.steps} are done: resume={self.resume} comes after {finished}")
        return self

    def checkpoints(self) -> Checkpoints:
        """Where the run starts as things are now, and what it leaves behind."""
        folder = from_root(self.checkpoint_dir) / self.run_id
        rows = folder.with_name(f"{folder.name}-rows")
        own = latest_checkpoint(folder) if self.resume is not None else None
        if own is not None and not has_iterations(rows, self.world_size, finished_steps(own)):
            own = None  # the record would lack steps
        return Checkpoints(
            folder=folder,
            every=self.checkpoint_every,
            keep=self.checkpoint_keep,
            start=own or self.given_checkpoint,
            rows=rows if own is not None or self.checkpoint_every is not None else None,
        )


def expand_training(name: str) -> list[Cell["TrainRunConfig"]]:
    """All runs of sweeps/train/<name>.yaml, as ``hiermoe train -m +sweeps/train=<name>`` would run them."""
    return expand_file(SWEEPS / "train" / f"{name}.yaml", "train", TrainRunConfig)


def training_on(cluster: Cluster, backend: BackendConfig) -> list[Cell["TrainRunConfig"]]:
    """Whole training steps on an allocation of GPUs, one sequence for each.

    Args:
        cluster: calibrated one of the allocation.
        backend: of the allocation.
    """
    num_ranks = str(cluster.hierarchy.num_ranks)
    instead = {"cluster": cluster.name, "world_size": num_ranks, "sequences_per_step": num_ranks}
    cells = expand_file(SWEEPS / "train" / "end_to_end_on_gpus.yaml", "train", TrainRunConfig, instead)
    return [Cell(cell.overrides, cell.config.model_copy(update={"backend": backend})) for cell in cells]


def trained_steps(source: str, store: RunStore) -> list["TrainRunConfig"]:
    """Runs of whole training steps that the figure of one kind of numbers has, whether they have a record or not.

    Raises:
        ValueError: the emulated cluster is not calibrated here.
    """
    if source == "emulated":
        return [cell.config for cell in expand_training("end_to_end")]
    allocations = [one for one in allocations_so_far(store) if one[0].device == "cuda"]
    return [cell.config for backend, name in allocations for cell in training_on(Cluster.named(name), backend)]


def train_and_print(config: TrainRunConfig) -> None:
    """Train and print what came out.

    Raises:
        ValueError: the run does not apply or failed; its record has the reason too.
    """
    if config.backend.on_this_host:
        _present(config)
        return
    assert config.backend.timeout_s is not None
    crew = Crew.join(config.backend.device, timedelta(seconds=config.backend.timeout_s), SCRATCH)
    if crew.world_size != config.world_size:
        raise ValueError(f"world_size={config.world_size}, but the allocation has {crew.world_size} processes")
    if crew.rank > 0:
        crew.serve()
        return
    try:
        with crew:
            _present(config, crew)
    except CrewEnded as error:
        leave(error)


def _present(config: TrainRunConfig, world: World | None = None) -> None:
    title = f"{config.system.label} · {config.model.name} · {config.cluster.name} · {config.dtype}"
    if config.data_parallel > 1:
        title += f" · {config.data_parallel} replicas"

    def run(store: RunStore, progress: Callable[[int], None]) -> Outcome:
        return execute_training(config, store, progress, world)

    present(config, title, config.steps, run, train_summary)


def keys_of_training(config: TrainRunConfig) -> dict[str, Any]:
    """Columns that all rows of a run share."""
    return {
        "source": config.backend.source,
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


def execute_training(
    config: TrainRunConfig,
    store: RunStore,
    progress: Callable[[int], None] = lambda step: None,
    world: World | None = None,
) -> Outcome:
    """Train unless the record is there, and store the record.

    Args:
        config: what to run.
        store: where records are.
        progress: called with the number of every finished step.
        world: ranks to train on; None for new ones.

    Returns:
        The outcome. A run whose ranks failed keeps the rows of the steps that all of them finished.
    """
    checkpoints = config.checkpoints()
    start = checkpoints.start
    job = TrainingJob(
        training=config,
        system=config.system,
        cluster=config.cluster,
        steps=config.steps,
        timeout=timedelta(minutes=config.timeout_minutes),
        checkpoints=checkpoints,
        backend=config.backend.name,
        device=config.backend.device,
    )

    def measure() -> pd.DataFrame:
        if start is None or start.parent != checkpoints.folder:  # what an earlier attempt left does not belong to this
            shutil.rmtree(checkpoints.folder, ignore_errors=True)
        return run_training(job, progress, world)

    provenance = {} if start is None else {"resumed_from": to_root(start)}
    return keep_record(config.run_id, config.content, keys_of_training(config), measure, store, provenance)
