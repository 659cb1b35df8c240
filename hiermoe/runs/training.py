"""`hiermoe train`: train a model under one system, as a record."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PositiveInt, model_validator

from hiermoe.measure.measurement import Measurement
from hiermoe.measure.registry import MEASUREMENTS
from hiermoe.measure.training_job import Checkpoints
from hiermoe.megatron.checkpoint_folder import check_files, finished_steps, newest_first
from hiermoe.narrow.corpus import corpus_key
from hiermoe.narrow.record_config import RecordConfig
from hiermoe.narrow.training_config import CorpusConfig, TrainingConfig
from hiermoe.policies.system import SystemConfig
from hiermoe.ranks.places import RanksConfig
from hiermoe.ranks.server import preload
from hiermoe.ranks.streams import has_iterations
from hiermoe.records.checksums import Damaged
from hiermoe.records.project import SWEEPS, find_file, in_workplace
from hiermoe.records.run_id import file_digest
from hiermoe.records.store import RunStore
from hiermoe.records.strict import checked, is_valid
from hiermoe.runs.compose import Cell, compose, expand_file, swept
from hiermoe.runs.measurable import keys_of, name_run
from hiermoe.runs.measured_cells import allocations_so_far, together
from hiermoe.runs.run_config import WandbConfig
from hiermoe.runs.single import present
from hiermoe.runs.summary import train_summary
from hiermoe.topology.cluster import Cluster

preload(__name__)  # as of run_config

NO_CONTENT = {"wandb", "cache_dir", "checkpoint_every", "checkpoint_keep", "checkpoint_dir", "resume"}


class TrainRunConfig(TrainingConfig):
    """One training run; the schema of conf/train.yaml, which names `world_size` in the place of `ep_size`.

    Attributes:
        system: What moves tokens.
        cluster: Hierarchy and constants, of `ep_size` GPUs.
        ranks: Where.
        steps: Of the optimizer.
        checkpoint_every: Steps between two checkpoints; None for no checkpoints.
        checkpoint_keep: So many of the newest checkpoints stay; None for all.
        checkpoint_dir: Folder of all runs' checkpoints, each run's in a folder of its name.
        resume: ``latest``: this run goes on from its own newest checkpoint, if it has one. A path: likewise, and from
            this checkpoint, whichever system wrote it, if it has none. None: from the beginning.
        wandb: Mirror of the record.
    """

    system: SystemConfig
    cluster: Cluster
    ranks: RanksConfig
    steps: int = Field(ge=2)
    checkpoint_every: PositiveInt | None
    checkpoint_keep: PositiveInt | None
    checkpoint_dir: str
    resume: str | None
    wandb: WandbConfig

    @model_validator(mode="before")
    @classmethod
    def _spread_ranks(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Ranks are split into expert-parallel groups, and the cluster is cut down to one of them."""
        values = dict(values)
        world_size, groups = int(values.pop("world_size")), int(values["data_parallel"])
        if world_size < 1 or groups < 1 or world_size % groups:
            raise ValueError(f"world_size={world_size} does not split into data_parallel={groups} replicas")
        ep_size = world_size // groups
        if not is_valid(values["cluster"], Cluster):
            return values | {"ep_size": ep_size}  # the field itself says what is wrong
        return values | {"ep_size": ep_size, "cluster": Cluster.model_validate(values["cluster"]).reduced(ep_size)}

    @property
    def content(self) -> dict[str, Any]:
        """Everything that may change a number, as JSON-ready values."""
        start = self.given_checkpoint
        files = [] if start is None else [path for path in sorted(start.rglob("*")) if path.is_file()]
        return self._content(corpus_key(self), [file_digest(path) for path in files])

    def _content(self, text: str, start: list[str | None]) -> dict[str, Any]:
        values = self.model_dump(mode="json", exclude=NO_CONTENT)
        return values | {"measure": "train", "corpus": self.corpus.name, "text": text, "start": start}

    @classmethod
    def of_content(cls, content: Mapping[str, Any]) -> Self:
        """The training whose content this is, as the present schema has it; one from the beginning.

        Raises:
            ValueError: it breaks a rule.
        """
        values = {key: value for key, value in content.items() if key not in ("measure", "text", "start")}
        values["corpus"] = CorpusConfig.named(str(content["corpus"])).model_dump()
        unsaid = dict.fromkeys(("checkpoint_every", "checkpoint_keep", "resume"))
        unsaid |= {"cache_dir": "", "checkpoint_dir": "", "wandb": {"mode": "disabled", "project": "hiermoe"}}
        world_size = int(content["ep_size"]) * int(content["data_parallel"])
        return checked(values | unsaid | {"world_size": world_size}, cls)

    @property
    def measurement(self) -> Measurement:
        """What is measured."""
        return MEASUREMENTS["train"]

    @property
    def ep_groups(self) -> int:
        """Each with all experts."""
        return self.data_parallel

    @property
    def run_id(self) -> str:
        """The name of the run, by its content; a checkpoint of another run that it starts from is part of that."""
        return name_run(self)

    def named_on(self, host: str | None, content: Mapping[str, Any]) -> str:
        """The name that the present code gives the run, measured on a machine, whose stored content this is.

        Its text and the checkpoint that it began from may be here no longer.
        """
        return name_run(self, host=host, content=self._content(content["text"], content["start"]))

    @property
    def keys(self) -> dict[str, Any]:
        """Columns that all rows of the record share."""
        tokens = self.sequences_per_rank * self.seq_length
        sizes = {"num_ranks": self.world_size, "tokens_per_rank": tokens}
        return keys_of(self, self.system, self.model, routing="trained", seed=self.seed, **sizes)

    @property
    def given_checkpoint(self) -> Path | None:
        """What `resume` names."""
        return None if self.resume in (None, "latest") else find_file(self.resume)

    @property
    def begun(self) -> int:
        """Steps that were finished in it."""
        return 0 if self.given_checkpoint is None else finished_steps(self.given_checkpoint)

    @model_validator(mode="after")
    def _check_given_checkpoint(self) -> Self:
        if self.begun + 2 > self.steps:
            raise ValueError(f"steps={self.steps} leave less than two: resume={self.resume} comes after {self.begun}")
        return self

    def checkpoints(self) -> Checkpoints:
        """Where the run starts as things are now, and what it leaves behind.

        Raises:
            Damaged: what `resume` names is.
            ValueError: the run has checkpoints, and all of them are damaged.
        """
        folder = in_workplace(self.checkpoint_dir) / self.run_id
        rows = folder.with_name(f"{folder.name}-rows")
        own, left_out = None, ()
        if self.resume is not None:
            own, left_out = self._own_checkpoint(folder, rows)
        if own is None and self.given_checkpoint is not None:
            check_files(self.given_checkpoint)
        return Checkpoints(
            folder=folder,
            every=self.checkpoint_every,
            keep=self.checkpoint_keep,
            start=own or self.given_checkpoint,
            rows=rows if own is not None or self.checkpoint_every is not None else None,
            left_out=left_out,
            begun=self.begun,
        )

    def _own_checkpoint(self, folder: Path, rows: Path) -> tuple[Path | None, tuple[str, ...]]:
        """The newest whole checkpoint of this run that the rows of all ranks reach up to, and why no later one is."""
        left_out: list[str] = []
        for checkpoint in newest_first(folder):
            try:
                if not has_iterations(rows, self.world_size, finished_steps(checkpoint)):
                    return None, (*left_out, f"{rows}: lacks steps that come before {checkpoint.name}")
                check_files(checkpoint)
            except Damaged as error:
                left_out.append(str(error))
            else:
                return checkpoint, tuple(left_out)
        if left_out:
            raise ValueError(f"{'; '.join(left_out)}; no whole checkpoint is left, resume=null begins anew")
        return None, ()


def expand_training(name: str) -> list[Cell["TrainRunConfig"]]:
    """All runs of sweeps/train/<name>.yaml, as ``hiermoe train -m +sweeps/train=<name>`` would run them."""
    return expand_file(SWEEPS / "train" / f"{name}.yaml", "train", TrainRunConfig)


def model_of_whole_steps() -> RecordConfig:
    """What trains the model that the runs of sweeps/train/end_to_end.yaml go on from."""
    model = swept(SWEEPS / "train" / "end_to_end.yaml")["model"]
    return compose("record", ["+recording=for_whole_steps", f"model={model}"], RecordConfig)


def training_on(cluster: Cluster, ranks: RanksConfig) -> list[Cell["TrainRunConfig"]]:
    """Whole training steps on an allocation of GPUs, one sequence for each.

    Args:
        cluster: calibrated one of the allocation.
        ranks: of the allocation.
    """
    num_ranks = str(cluster.hierarchy.num_ranks)
    instead = {"cluster": cluster.name, "world_size": num_ranks, "sequences_per_step": num_ranks}
    cells = expand_file(SWEEPS / "train" / "end_to_end_on_gpus.yaml", "train", TrainRunConfig, instead)
    return [Cell(cell.overrides, cell.config.model_copy(update={"ranks": ranks})) for cell in cells]


def trainings(store: RunStore) -> dict[str, list[Cell["TrainRunConfig"]]]:
    """Training that figures show: loss curves, and whole steps on whatever ranks there have been."""
    steps = [
        cell
        for ranks, name in allocations_so_far(store)
        if ranks.device == "cuda"
        for cell in training_on(Cluster.named(name), ranks)
    ]
    for name in ("end_to_end", "end_to_end_deepseek_v3"):
        with suppress(ValueError):  # no calibrated emulated cluster here, or no model, so nothing was trained on it
            steps += expand_training(name)
    return {"losses": expand_training("losses"), "end_to_end": steps}


def train_and_print(*configs: TrainRunConfig) -> None:
    """Train and print what came out.

    Args:
        configs: one, or several that differ in their system alone: these train interleaved, on the same ranks.

    Raises:
        ValueError: one failed, or under no ``-m`` does not apply; its record has the reason too.
    """
    present(configs, [_title(config) for config in configs], train_summary)


def train_all_and_print(configs: Sequence[TrainRunConfig]) -> None:
    """Train and print what came out, in groups.

    Raises:
        ValueError: one failed; those after it are not trained.
    """
    for group in trained_together(configs):
        train_and_print(*group)


def trained_together(configs: Sequence[TrainRunConfig]) -> list[list[TrainRunConfig]]:
    """Group runs that differ in their system alone, to train interleaved.

    Each alone are those on GPUs, which a model may fill, and those that keep checkpoints or look for their own.
    """
    alone = [c for c in configs if c.ranks.device == "cuda" or c.checkpoint_every is not None or c.resume == "latest"]
    return together(c for c in configs if c not in alone) + [[c] for c in alone]


def _title(config: TrainRunConfig) -> str:
    title = f"{config.system.label} · {config.model.name} · {config.cluster.name} · {config.dtype}"
    return title + (f" · {config.data_parallel} expert-parallel groups" if config.data_parallel > 1 else "")
