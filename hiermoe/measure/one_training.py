"""A training on one rank, step by step, so that several can take turns."""

import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hiermoe.measure.training_job import TrainingJob
from hiermoe.megatron.attach import attach
from hiermoe.megatron.meter import Meter
from hiermoe.narrow.corpus import Corpus
from hiermoe.narrow.trainer import Diverged, Trainer
from hiermoe.ranks.world import Device
from hiermoe.routing.step import first_measured


class OneTraining:
    """Model, optimizer and system of one job. *Collective: every rank of the world must make it and call its methods.*

    Attributes:
        next_step: of the optimizer, from 0.
    """

    def __init__(self, job: TrainingJob, meter: Meter, timeout: timedelta, device: Device) -> None:
        """Build the model, and go on from the checkpoint that the job starts from.

        Args:
            job: what to do.
            meter: of all trainings of this process.
            timeout: of a collective.
            device: of the ranks.
        """
        self._job, self._meter = job, meter
        self._trainer = Trainer(job.training, timeout, device=device)
        self._placement = attach(self._trainer.model, job.system, job.cluster, meter=meter, timeout=timeout)
        self._good = job.checkpoints.start
        self.next_step = 0 if self._good is None else self._trainer.load(self._good, self._placement)
        begun = job.checkpoints.begun
        self._measured_from = begun + first_measured(job.steps - begun, None)

    @property
    def moves_travel(self) -> bool:
        """Whether experts are on their way beside the next step."""
        return self._placement.moves_travel

    def step(self, corpus: Corpus) -> dict[str, Any]:
        """Train on one step's sequences.

        Returns:
            Its row, without the rank.

        Raises:
            Diverged: on every rank; names the last good checkpoint.
        """
        step, placement = self.next_step, self._placement
        sequences = self._trainer.batch(corpus, step)
        dist.barrier()
        started = time.perf_counter()
        try:
            loss = self._trainer.step(sequences)
        except Diverged as error:
            whole = "no checkpoint was saved before"
            if self._good is not None:
                whole = f"the last good checkpoint is {self._good}"
            raise Diverged(f"{error}; {whole}") from error
        step_ms = (time.perf_counter() - started) * 1e3 - placement.measuring_ms
        calls = self._meter.drain()
        updates = placement.step(self._trainer.optimizer)
        self.next_step += 1
        row = {
            "iteration": step,
            "routing_iteration": step,
            "counted": step >= self._measured_from,
            "layer": -1,
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
        return row | _alltoall_times(calls)

    def save_if_due(self) -> None:
        """Write a checkpoint after every so many steps."""
        saved = self._job.checkpoints
        if saved.every is not None and self.next_step % saved.every == 0:
            self._good = self._trainer.save(saved.folder, self.next_step, self._placement, keep=saved.keep)
            self._meter.drain()

    def close(self) -> None:
        """Take Megatron's process groups down, which all trainings of this process share."""
        self._trainer.close()


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
