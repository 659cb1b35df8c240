"""What ranks train: a job that all of them know."""

from dataclasses import dataclass
from pathlib import Path

from hiermoe.narrow.training_config import TrainingConfig
from hiermoe.policies.system import SystemConfig
from hiermoe.topology.cluster import Cluster


@dataclass(frozen=True)
class Checkpoints:
    """Where training starts, and what it leaves behind to go on from.

    Attributes:
        folder: of this run's checkpoints and nothing else.
        every: steps between two; None for none.
        keep: so many of the newest stay; None for all.
        start: checkpoint to go on from; None for the beginning.
        rows: folder of the ranks' rows, which outlive a killed run there; None for a temporary one.
        left_out: later ones that are damaged, and why; a line each.
        begun: steps that were finished where the run itself began, in another run's checkpoint.
    """

    folder: Path
    every: int | None = None
    keep: int | None = None
    start: Path | None = None
    rows: Path | None = None
    left_out: tuple[str, ...] = ()
    begun: int = 0


@dataclass(frozen=True)
class TrainingJob:
    """What every rank must know.

    Attributes:
        training: model, sequences and optimizer.
        system: what moves tokens.
        cluster: hierarchy and constants, of `training.ep_size` GPUs.
        steps: of the optimizer, those before the checkpoint that it starts from included.
        checkpoints: where it starts, and what it saves.
    """

    training: TrainingConfig
    system: SystemConfig
    cluster: Cluster
    steps: int
    checkpoints: Checkpoints
