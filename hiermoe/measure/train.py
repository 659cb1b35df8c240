"""Training: stock Megatron on the ranks of a world, its MoE layers given the dispatcher of a system."""

import shutil
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import torch.distributed as dist

from hiermoe.measure.measurement import Measurement
from hiermoe.narrow.corpus import Corpus, training_corpus
from hiermoe.narrow.training_config import TrainingConfig
from hiermoe.planner.cost import check_overlap
from hiermoe.policies.system import SystemConfig
from hiermoe.ranks.streams import RowStream
from hiermoe.ranks.world import Device, Progress, World
from hiermoe.records.project import shown
from hiermoe.routing.step import first_measured
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


class Train(Measurement):
    """One row of the phase train for every step and rank."""

    command = "train"
    needs_ranks = True

    def prepare(self, config: Any) -> TrainingJob:
        """The job of `hiermoe train`'s configuration.

        Raises:
            NotApplicable: the system needs more levels than the hierarchy has or what this machine lacks, or keeps
                experts in more than one place.
            ValueError: a bad scheme or policy.
        """
        for scheme in config.system.build_schemes(config.cluster.hierarchy):
            check_overlap(scheme, config.cluster)
        config.system.refuse_copies()  # bad arguments end the run here too, not on the ranks
        return TrainingJob(config, config.system, config.cluster, config.steps, config.checkpoints())

    def num_steps(self, job: TrainingJob) -> int:
        """Of the optimizer."""
        return job.steps

    def provenance(self, job: TrainingJob) -> dict[str, Any]:
        """The checkpoint that it goes on from, and those that it does not."""
        start, left_out = job.checkpoints.start, job.checkpoints.left_out
        resumed = {} if start is None else {"resumed_from": shown(start)}
        return resumed | ({"left_out": list(left_out)} if left_out else {})

    def measure_one(self, job: TrainingJob, world: World, progress: Progress) -> pd.DataFrame:
        """Rows of the phase train.

        Raises:
            ValueError: a text too short for the vocabulary.
            RunDied: a rank failed.
        """
        saved = job.checkpoints
        for line in saved.left_out:
            where = "the beginning" if saved.start is None else shown(saved.start)
            print(f"{line}: left out, training goes on from {where}", file=sys.stderr)
        if saved.start is None or saved.start.parent != saved.folder:  # what an earlier attempt left is not this run's
            shutil.rmtree(saved.folder, ignore_errors=True)
        corpus = training_corpus(job.training)
        return world.run(train, (job, corpus, world.timeout, world.device), progress, saved.rows)


def train(rank: int, job: TrainingJob, corpus: Corpus, timeout: timedelta, device: Device, folder: Path) -> None:
    """One rank's share of all steps. *Collective: every rank of the world must call it.*

    Args:
        rank: of the world.
        job: what to do.
        corpus: what to train on.
        timeout: of a collective.
        device: of the ranks.
        folder: where ranks stream their rows to.
    """
    from hiermoe.megatron.standins import cpu

    cpu.expect_fallbacks()
    # Only the ranks need megatron; the fork server has imported it for them.
    from hiermoe.megatron.attach import attach
    from hiermoe.megatron.meter import Meter
    from hiermoe.narrow.trainer import Diverged, Trainer

    meter = Meter()
    trainer = Trainer(job.training, timeout, device=device)
    placement = attach(trainer.model, job.system, job.cluster, meter=meter, timeout=timeout)
    saved = job.checkpoints
    good, start = saved.start, 0
    if good is not None:
        start = trainer.load(good, placement)
    with RowStream(folder, rank, start) as stream, meter:
        measured_from = saved.begun + first_measured(job.steps - saved.begun, None)
        for step in range(start, job.steps):
            sequences = trainer.batch(corpus, step)
            dist.barrier()
            started = time.perf_counter()
            try:
                loss = trainer.step(sequences)
            except Diverged as error:
                whole = "no checkpoint was saved before" if good is None else f"the last good checkpoint is {good}"
                raise Diverged(f"{error}; {whole}") from error
            step_ms = (time.perf_counter() - started) * 1e3
            calls = meter.drain()
            updates = placement.step(trainer.optimizer)
            row = {
                "iteration": step,
                "routing_iteration": step,
                "counted": step >= measured_from,
                "layer": -1,
                "rank": rank,
                "phase": "train",
                "stage": "all",
                "loss": loss,
                "train_step_ms": step_ms,
                "planning_ms": placement.planning_ms,
                "moved_experts": sum(update.moved_experts for update in updates),
                "moves": "; ".join(f"layer {update.layer}: {update.moves}" for update in updates),
                "migration_bytes": sum(update.sent_bytes for update in updates),
                "migration_ms": placement.migration_ms,
                "landing_ms": placement.landing_ms,
                "hidden_ms": max((update.hidden_ms for update in updates), default=0.0),
            }
            stream.write([row | _alltoall_times(calls)])
            if saved.every is not None and (step + 1) % saved.every == 0:
                good = trainer.save(saved.folder, step + 1, placement, keep=saved.keep)
                meter.drain()
    trainer.close()


def _alltoall_times(calls: list[Any]) -> dict[str, float]:
    """What dispatch and combine of all layers took in one step; recomputed ones count as forward."""
    backward = [call.total_ms for call in calls if call.phase.endswith("_backward")]
    total_ms, wire_ms = sum(call.total_ms for call in calls), sum(call.wire_ms for call in calls)
    return {
        "alltoall_forward_ms": total_ms - sum(backward),
        "alltoall_backward_ms": sum(backward),
        "wire_ms": wire_ms,
        "local_ms": total_ms - wire_ms,
    }
