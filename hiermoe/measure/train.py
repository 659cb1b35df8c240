"""Training: stock Megatron on the ranks of a world, its MoE layers given the dispatcher of a system."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd

from hiermoe.measure.measurement import Measurement, by_job
from hiermoe.measure.training_job import TrainingJob
from hiermoe.narrow.corpus import Corpus, training_corpus
from hiermoe.planner.cost import check_overlap
from hiermoe.ranks.streams import RowStream
from hiermoe.ranks.world import Device, Progress, World
from hiermoe.records.project import shown


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
        """Of the optimizer, that are this run's own."""
        return job.steps - job.checkpoints.begun

    def provenance(self, job: TrainingJob) -> dict[str, Any]:
        """The checkpoint that it goes on from, and those that it does not."""
        start, left_out = job.checkpoints.start, job.checkpoints.left_out
        resumed = {} if start is None else {"resumed_from": shown(start)}
        return resumed | ({"left_out": list(left_out)} if left_out else {})

    def measure(self, jobs: Sequence[TrainingJob], world: World, progress: Progress) -> list[pd.DataFrame]:
        """Rows of the phase train. Several jobs train interleaved, unless one keeps checkpoints: then in a row.

        Raises:
            ValueError: a text too short for the vocabulary.
            RunDied: a rank failed; has the rows of all jobs, with a column ``of``.
        """
        if len(jobs) > 1 and any(job.checkpoints.rows is not None for job in jobs):
            return [rows for job in jobs for rows in self.measure([job], world, progress)]
        for saved in (job.checkpoints for job in jobs):
            for line in saved.left_out:
                where = "the beginning" if saved.start is None else shown(saved.start)
                print(f"{line}: left out, training goes on from {where}", file=sys.stderr)
            if saved.start is None or saved.start.parent != saved.folder:  # what an earlier attempt left is not its own
                shutil.rmtree(saved.folder, ignore_errors=True)
        corpus = training_corpus(jobs[0].training)
        rows = world.run(train, (tuple(jobs), corpus, world.timeout, world.device), progress, jobs[0].checkpoints.rows)
        return by_job(rows, len(jobs))


def train(
    rank: int, jobs: Sequence[TrainingJob], corpus: Corpus, timeout: timedelta, device: Device, folder: Path
) -> None:
    """One rank's share of all steps. *Collective: every rank of the world must call it.*

    All jobs do a step before any does its next, each time another one first, so that whatever else the machine does
    meets all alike. One whose experts travel in the background goes on until they have arrived: they travel beside its
    own steps. Rows have a column ``of``: the job's place in the list.

    Args:
        rank: of the world.
        jobs: what to do; several differ in their system alone.
        corpus: what to train on.
        timeout: of a collective.
        device: of the ranks.
        folder: where ranks stream their rows to.
    """
    from hiermoe.megatron.standins import cpu

    cpu.expect_fallbacks()
    # Only the ranks need megatron; the fork server has imported it for them.
    from hiermoe.measure.one_training import OneTraining
    from hiermoe.megatron.meter import Meter

    meter = Meter()
    trainings = [OneTraining(job, meter, timeout, device) for job in jobs]
    first, last = trainings[0].next_step, jobs[0].steps
    with RowStream(folder, rank, first) as stream, meter:
        for step in range(first, last):
            order = turns(trainings, step, last)
            stream.write([{"of": of, "rank": rank} | trainings[of].step(corpus) for of in order])
            for training in trainings:
                training.save_if_due()
    trainings[0].close()


def turns(trainings: Sequence[Any], step: int, last: int) -> Iterator[int]:
    """Whose step comes next, until all have finished one: each time another first, and whose experts travel goes on.

    Args:
        trainings: each with ``next_step`` and ``moves_travel``, which its step changes.
        step: that all are to finish.
        last: steps that there are.
    """
    for turn in range(len(trainings)):
        of = (step + turn) % len(trainings)
        while trainings[of].next_step <= step or (trainings[of].moves_travel and trainings[of].next_step < last):
            yield of
