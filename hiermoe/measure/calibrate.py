"""Times the AlltoAll of every kind of peers of a cluster, over message sizes: what alpha and beta are fitted to.

And the two stages of HD2 in one chunk and in several, which tells how far stages overlap and what a chunk costs.
"""

import math
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from hiermoe.dispatch.communicators import Communicator, Communicators
from hiermoe.dispatch.interposer import synchronise
from hiermoe.dispatch.plan import begin_exchange
from hiermoe.dispatch.rows import RowCopies
from hiermoe.dispatch.waves import Leg, in_waves
from hiermoe.measure.measurement import Measurement
from hiermoe.planner.fit import CHUNKS, COPIES, TWO_STAGES, fit_exchanges
from hiermoe.planner.scheme import every_dimension
from hiermoe.ranks.streams import RowStream
from hiermoe.ranks.world import Device, Progress, World
from hiermoe.records.strict import Strict
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import Peers

# Ranks leave a barrier one after another; bytes of the first must not keep the last in it.
_SETTLE_SECONDS = 0.03
_MOST_TURNS = 4  # of all repeats
_PARTS = (4, 8, 16, 32)  # of the most bytes, for the stages in chunks


class Timing(NamedTuple):
    """What is timed.

    Attributes:
        repeat: the round; negative: warm-up.
        exchanges: one after the other.
        num_bytes: at a GPU in the first.
        chunks: that pass them.
    """

    repeat: int
    exchanges: tuple[Peers, ...]
    num_bytes: int
    chunks: int


class CalibrationJob(Strict):
    """What every rank must know.

    Attributes:
        cluster: hierarchy, with one rank for every GPU.
        smallest_pair_bytes: that one rank sends another in the first AlltoAll; doubled from there on.
        largest_pair_bytes: in the last one.
        largest_bytes: that a rank receives in one AlltoAll, its own share included; ends the doubling too.
        chunked_row_bytes: of a row that chunks are cut from; on emulated ranks as of narrowed models.
        warm_ups: rounds of the smallest size that do not count; they make connections.
        repeats: rounds that count.
    """

    cluster: Cluster
    smallest_pair_bytes: int = Field(ge=1)
    largest_pair_bytes: int = Field(ge=1)
    largest_bytes: int = Field(ge=1)
    chunked_row_bytes: int = Field(ge=16, multiple_of=16)
    warm_ups: int = Field(ge=0)
    repeats: int = Field(ge=1)

    def pair_bytes(self, exchange: Peers) -> list[int]:
        """Sizes for one kind of peers, ascending; at least two."""
        largest = min(self.largest_pair_bytes, self.largest_bytes // exchange.size(self.cluster.hierarchy))
        sizes = [self.smallest_pair_bytes]
        while len(sizes) < 2 or sizes[-1] * 2 <= largest:
            sizes.append(sizes[-1] * 2)
        return sizes

    def bytes_in_chunks(self) -> list[int]:
        """Bytes at a GPU in the first of HD2's stages, where both are timed; ascending, none on a single level."""
        if not set(TWO_STAGES) <= set(self.cluster.exchanges):
            return []
        sizes = [exchange.size(self.cluster.hierarchy) for exchange in TWO_STAGES]
        most = min(self.pair_bytes(x)[-1] * size for x, size in zip(TWO_STAGES, sizes, strict=True))
        step = math.lcm(*sizes) * self.chunked_row_bytes
        return sorted({max(most // part // step, 1) * step for part in _PARTS})

    def timings(self) -> Iterator[Timing]:
        """Rounds are outermost, so that drift meets all alike."""
        for warm_up in range(-self.warm_ups, 0):
            for exchange in self.cluster.exchanges:
                yield self._timing(warm_up, exchange, self.smallest_pair_bytes)
            for num_bytes in self.bytes_in_chunks()[:1]:
                yield Timing(warm_up, TWO_STAGES, num_bytes, CHUNKS[-1])
        for repeat in range(self.repeats):
            for exchange in self.cluster.exchanges:
                for pair_bytes in self.pair_bytes(exchange):
                    yield self._timing(repeat, exchange, pair_bytes)
            for num_bytes in self.bytes_in_chunks():
                for chunks in CHUNKS:
                    yield Timing(repeat, TWO_STAGES, num_bytes, chunks)

    def _timing(self, repeat: int, exchange: Peers, pair_bytes: int) -> Timing:
        return Timing(repeat, (exchange,), pair_bytes * exchange.size(self.cluster.hierarchy), 1)


class Calibrate(Measurement):
    """One row of the phase calibration for every AlltoAll, size, repeat and rank."""

    command = "calibrate"
    needs_ranks = True
    needs_system = False

    def prepare(self, config: Any) -> CalibrationJob:
        """The job of `hiermoe calibrate`'s configuration."""
        return CalibrationJob(**{name: getattr(config, name) for name in CalibrationJob.model_fields})

    def num_steps(self, job: CalibrationJob) -> int:
        """One a measurement."""
        return sum(1 for _ in job.timings())

    def measure_one(self, job: CalibrationJob, world: World, progress: Progress) -> pd.DataFrame:
        """On one rank for every GPU of the job's cluster.

        On a cluster, whose links' rates follow from it, all is done again where other work hides that more bytes take
        longer.

        Raises:
            ValueError: it still does.
        """
        parts, flat = [], []
        for turn in range(_MOST_TURNS):
            rows = world.run(calibrate, (job, world.timeout, world.device), progress)
            if world.source != "cluster":
                return rows
            parts.append(rows.assign(iteration=rows["iteration"] + turn * job.repeats))
            found = pd.concat(parts, ignore_index=True)
            flat = [str(peers) for peers, fit in fit_exchanges(found, job.cluster).items() if fit.beta_ms_per_byte <= 0]
            if not flat:
                return found
        repeats = _MOST_TURNS * job.repeats
        raise ValueError(
            f"{', '.join(flat)}: more bytes took no longer in {repeats} repeats; calibrate on an idle machine"
        )


def calibrate(rank: int, job: CalibrationJob, timeout: timedelta, device: Device, folder: Path) -> None:
    """One rank's share of all measurements. *Collective: every rank of the world must call it.*

    All communicators of a kind exchange at once, as in a stage. Each measurement begins with a barrier of all ranks; on
    CUDA its time ends when the GPU is through.

    Args:
        rank: of the world, and GPU of the hierarchy.
        job: what to do.
        timeout: of a collective.
        device: of the tensors.
        folder: where ranks stream their rows to.
    """
    hierarchy = job.cluster.hierarchy
    world = dist.group.WORLD
    assert world is not None
    communicators = Communicators(world, hierarchy, every_dimension(hierarchy), timeout)
    largest = max(timing.num_bytes for timing in job.timings())
    source = torch.zeros(largest, dtype=torch.uint8, device=device)
    with RowStream(folder, rank) as stream:
        for repeat, exchanges, num_bytes, chunks in job.timings():
            chosen = [communicators.of(exchange) for exchange in exchanges]
            if len(chosen) == 1:
                rows_RM, legs = source[:num_bytes].view(len(chosen[0].members), -1), [_bare_leg(chosen[0])]
            else:
                rows_RM = source[:num_bytes].view(torch.bfloat16).view(-1, job.chunked_row_bytes // 2)
                legs = [
                    _leg(communicator, rows_RM, copies)
                    for communicator, copies in zip(chosen, (1, COPIES), strict=True)
                ]
            dist.barrier()
            synchronise(source.device)
            time.sleep(_SETTLE_SECONDS)
            started = time.perf_counter()
            in_waves(rows_RM, legs, chunks)
            synchronise(source.device)
            elapsed_ms = (time.perf_counter() - started) * 1e3
            row = {
                "phase": "calibration",
                "stage": "+".join(map(str, exchanges)),
                "chunks": chunks,
                "iteration": repeat,
                "routing_iteration": -1,
                "counted": True,
                "layer": -1,
                "rank": rank,
                "bytes": num_bytes,
                "wire_ms": elapsed_ms,
            }
            stream.write([row] if repeat >= 0 else [])


def _bare_leg(communicator: Communicator) -> Leg:
    """The exchange alone, of a row for every member."""
    splits = [1] * len(communicator.members)
    return Leg(lambda x_RM, beside: begin_exchange(x_RM, splits, splits, communicator.group, beside))


def _leg(communicator: Communicator, rows_RM: Tensor, copies: int) -> Leg:
    """An exchange of rows, each copied so often before and its copies summed after.

    A dispatcher copies on the way out and sums on the way back: this is the local work of both.
    """
    num_rows, size = len(rows_RM), len(communicator.members)
    splits = [copies * num_rows // size] * size
    local = RowCopies.of(torch.arange(copies * num_rows, device=rows_RM.device) % num_rows, num_rows, all_used=True)
    return Leg(
        lambda x_RM, beside: begin_exchange(local.copy(x_RM), splits, splits, communicator.group, beside), local.sum
    )
