"""Replays a routing trace through the real dispatchers on real ranks: rows move, experts are replaced by known factors.

Inputs, factors, routing weights and output gradients are small integers, so every result has a known answer that a rank
can compute alone and that no dtype rounds. It is compared in every iteration, beside the times.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist

from hiermoe.dispatch.communicators import reduced
from hiermoe.measure.measurement import Measurement, by_job
from hiermoe.measure.replay_job import ReplayJob
from hiermoe.measure.walk import realised_gains, start_at, walk
from hiermoe.measure.workload import Workload, open_workload
from hiermoe.policies.protocol import Start
from hiermoe.policies.system import SystemConfig
from hiermoe.ranks.memory import bytes_of_rank, check_memory
from hiermoe.ranks.streams import RowStream, shared_folder
from hiermoe.ranks.world import Progress, World
from hiermoe.records.schema import CALLS, COPIES
from hiermoe.routing.step import experts_per_rank

Row = dict[str, Any]

_WARM_UPS = 1  # iterations before those that count; the first makes connections
_CLEAR_PEAK = "5"  # man 5 proc: /proc/pid/clear_refs


def replay(rank: int, job: ReplayJob, systems: Sequence[tuple[SystemConfig, Start]], folder: Path) -> None:
    """One rank's share of all iterations of all systems. *Collective: every rank of the world must call it.*

    Every call begins on all ranks together, and after the four the rows of dispatch are sent once more, stage by stage.
    All systems do iteration i before any does iteration i + 1, each time another one first, so that whatever else the
    machine does meets all alike. Rows have a column ``of``: the system's place in the list.

    Args:
        rank: of the world, and GPU of the hierarchy.
        job: what to do.
        systems: what to do it with, and where its experts are when it starts.
        folder: where ranks stream their rows to.
    """
    # Only the ranks pay for importing megatron.
    from hiermoe.megatron.standins import cpu

    if job.device == "cpu":
        cpu.expect_fallbacks()
    from hiermoe.measure.bench_layer import Question, bench_layer
    from hiermoe.megatron.meter import Meter

    meter = Meter(align=dist.barrier, repeatable=True)
    layers = [bench_layer(system, job, meter, start) for system, start in systems]
    with RowStream(folder, rank) as stream, meter:
        for iteration in range(job.first, len(job.routing_iterations)):
            routing_iteration = job.routing_iterations[iteration]
            ids_TK = job.load(routing_iteration, rank)
            generator = torch.Generator().manual_seed(iteration * job.cluster.hierarchy.num_ranks + rank)
            question = Question.draw(ids_TK, job, generator)
            rows: list[Row] = []
            for turn in range(len(layers)):
                of = (iteration + turn) % len(layers)
                dispatcher, placement = layers[of]
                _forget_peak(job.device)
                keys = {
                    "of": of,
                    "iteration": iteration,
                    "routing_iteration": routing_iteration,
                    "counted": job.counted[iteration],
                    "layer": job.layer,
                    "rank": rank,
                    "num_wrong": question.ask(dispatcher, job),
                }
                calls = meter.drain()
                alone_ms = _repeat_rows(next(call for call in calls if call.phase == "dispatch"), job)
                copies = [call for call in calls if call.phase in COPIES]
                calls = [call for call in calls if call.phase in CALLS]
                step = _step_row(calls, copies, rank, job.device) | _update_columns(placement)
                told = (*_call_rows(calls, rank, job, alone_ms), *_copy_rows(copies, rank), step)
                rows += [keys | row for row in told]
            stream.write(rows)


class Replay(Measurement):
    """Measures systems together, interleaved.

    Of the iterations before those that count only the last is replayed, to warm up. What policies learn from the
    others, and where that puts experts, is found by walking through them, as the simulation does.
    """

    needs_ranks = True

    def prepare(self, config: Any) -> Workload:
        """Everything built and open.

        Raises:
            ValueError: the ranks would not hold equally many experts (only simulation has empty slots), or this machine
                has too little memory for them.
        """
        num_ranks, sizes = config.cluster.hierarchy.num_ranks, config.sizes
        experts_per_rank(sizes.num_experts, num_ranks)
        if config.ranks.on_this_host:
            each = bytes_of_rank(config.tokens_per_rank, sizes.topk, sizes.row_bytes)
            check_memory(num_ranks, each, "take a smaller world_size=, fewer tokens_per_rank=, or narrowed= rows")
        return open_workload(config)

    def num_steps(self, job: Workload) -> int:
        """Iterations that are replayed."""
        return job.iterations - _first_replayed(job)

    def measure(self, jobs: Sequence[Workload], world: World, progress: Progress) -> list[pd.DataFrame]:
        """Rows of the phases start, dispatch, combine, their backward, copies, gradients, and step, of every rank.

        Raises:
            ValueError: results would not be exact in this dtype.
            RunDied: a rank failed; has the rows of all systems, with a column ``of``.
        """
        first = jobs[0]
        begin = _first_replayed(first)
        starts = [start_at(workload, begin) for workload in jobs]
        with shared_folder() as folder:
            job = ReplayJob(
                cluster=first.cluster,
                sizes=first.sizes,
                layer=first.layer,
                counted=tuple(iteration >= first.measured_from for iteration in range(first.iterations)),
                routing_iterations=tuple(first.schedule),
                first=begin,
                routing=folder,
                timeout=world.timeout,
                device=world.device,
                one_machine=world.source != "cluster",
            )
            for iteration in sorted(set(first.schedule[begin:])):
                job.save(iteration, first.routing.step(iteration))
            systems = tuple((workload.system, start) for workload, start in zip(jobs, starts, strict=True))
            rows = world.run(replay, (job, systems), progress)
        parts = by_job(rows, len(jobs))
        return [_with_moves(*each) for each in zip(parts, jobs, starts, strict=True)]


def _first_replayed(workload: Workload) -> int:
    """First iteration of a run that is replayed; those before it are only walked through."""
    return max(0, workload.measured_from - _WARM_UPS)


def _with_moves(rows: pd.DataFrame, workload: Workload, start: Start) -> pd.DataFrame:
    """Add where experts were at the start, and what each measured update saved by exact count.

    The latter follows from the moves that rank 0 recorded.

    Raises:
        RuntimeError: moves of experts with copies, which do not say who uses which, are not those of the same policy on
            the same routing.
    """
    moves = rows[(rows["phase"] == "step") & (rows["rank"] == 0)].sort_values("iteration")["moves"]
    placements = [start.placement]
    if workload.system.makes_copies:
        placements = [visit.home for visit in walk(workload, workload.new_policy())][start.iteration :]
        if [old.moves_to(new) for old, new in pairwise(placements)] != moves[:-1].tolist():
            raise RuntimeError(f"system={workload.system.name}: ranks moved other experts than the simulation does")
    else:
        for text in moves[:-1]:
            placements.append(placements[-1].after(text) if text else placements[-1])
    gains = realised_gains(workload, placements, start.iteration)
    gained = rows["iteration"].map(gains).where(rows["phase"] == "step")
    rows = rows.assign(realised_gain_ms=gained.astype(float))
    moves = workload.first_places.moves_to(start.placement)
    before = {"phase": "start", "stage": "all", "layer": workload.layer, "moves": moves}
    before |= {"iteration": -1, "routing_iteration": -1, "counted": False, "rank": -1}
    return pd.concat([pd.DataFrame([before]), rows], ignore_index=True)


def _update_columns(placement: Any) -> Row:
    """Decide and move experts after the iteration. *Collective.*"""
    updates = placement.step(None)
    gains = [update.modelled_gain_ms for update in updates if update.modelled_gain_ms is not None]
    return {
        "planning_ms": placement.planning_ms,
        "moved_experts": sum(update.moved_experts for update in updates),
        "moves": " ".join(update.moves for update in updates),
        "migration_bytes": sum(update.sent_bytes for update in updates),
        "migration_ms": sum(update.migration_ms for update in updates),
    } | ({"modelled_gain_ms": sum(gains)} if gains else {})


def _repeat_rows(dispatch: Any, job: ReplayJob) -> dict[str, float]:
    """Send the rows of a dispatch again, each stage once all ranks are there. *Collective.*

    What a stage takes in the dispatcher above this is waiting for ranks that come late.

    Returns:
        ms of every stage: from the first rank's start to the last one's end where all ranks are on one machine, else of
        this rank.
    """
    alone_ms: dict[str, float] = {}
    for transfer in dispatch.transfers:
        if transfer.kind == "payload":
            dist.barrier()
            started = time.perf_counter()
            transfer.repeat()
            ends = torch.tensor([-started, time.perf_counter()], dtype=torch.float64)
            if job.one_machine:
                ends = reduced(ends, dist.ReduceOp.MAX)
            alone_ms[transfer.stage] = alone_ms.get(transfer.stage, 0.0) + ends.sum().item() * 1e3
    return alone_ms


def _call_rows(calls: list[Any], rank: int, job: ReplayJob, alone_ms: Mapping[str, float]) -> Iterator[Row]:
    """For every call one row a stage and one for the whole."""
    row_bytes = job.sizes.row_bytes
    for call in calls:
        incoming = call.phase in ("dispatch", "combine_backward")  # towards the experts; else what is sent counts
        moved = [(t, t.received_bytes if incoming else t.sent_bytes) for t in call.transfers]
        payload = [(t, amounts) for t, amounts in moved if t.kind == "payload"]
        total = {"phase": call.phase, "dimension": len({t.stage for t, _ in payload})}
        total["chunks"] = 1 if call.plan is None else call.plan.scheme.chunks
        for stage in dict.fromkeys(t.stage for t in call.transfers):
            num_bytes = sum(sum(amounts) for t, amounts in payload if t.stage == stage)
            own_bytes = sum(amounts[t.members.index(rank)] for t, amounts in payload if t.stage == stage)
            all_bytes = sum(sum(amounts) for t, amounts in moved if t.stage == stage)
            row = {
                "stage": stage,
                "wire_ms": sum(t.wire_ms for t in call.transfers if t.stage == stage),
                "rows": num_bytes // row_bytes,
                "bytes": num_bytes,
                "crossing_rows": (num_bytes - own_bytes) // row_bytes,
                "metadata_bytes": all_bytes - num_bytes,
            }
            yield total | row | ({"alone_ms": alone_ms[stage]} if call is calls[0] and stage in alone_ms else {})
        yield total | {
            "stage": "all",
            "wire_ms": call.wire_ms,
            "local_ms": call.total_ms - call.wire_ms,
            "dispatch_ms": call.total_ms,
        }


def _copy_rows(calls: list[Any], rank: int) -> Iterator[Row]:
    """One for everything that was sent at once for copies of experts, with the bytes that this rank sent."""
    for call in calls:
        stages = {transfer.stage for transfer in call.transfers}
        stage = stages.pop() if stages else "none"
        yield {"phase": call.phase, "stage": stage, "dispatch_ms": call.total_ms, "bytes": _sent_bytes(call, rank)}


def _sent_bytes(call: Any, rank: int) -> int:
    return sum(sum(t.sent_bytes) - t.sent_bytes[t.members.index(rank)] for t in call.transfers)


def _step_row(calls: list[Any], copies: list[Any], rank: int, device: str) -> Row:
    """The four calls together, and beside them what was sent for copies of experts."""
    assert [call.phase for call in calls] == list(CALLS), f"calls of an iteration: {[call.phase for call in calls]}"
    plan = calls[0].plan
    dropped = {} if plan is None else {"pairs": plan.traffic.total_pairs, "dropped_pairs": plan.traffic.dropped_pairs}
    total_ms, wire_ms = sum(call.total_ms for call in calls), sum(call.wire_ms for call in calls)
    ms = {phase: sum(call.total_ms for call in copies if call.phase == phase) for phase in COPIES}
    sent = {phase: sum(_sent_bytes(call, rank) for call in copies if call.phase == phase) for phase in COPIES}
    return dropped | {
        "copies_ms": ms["copies"],
        "copies_bytes": sent["copies"],
        "gradient_ms": ms["gradients"],
        "gradient_bytes": sent["gradients"],
        "net_ms": total_ms + sum(ms.values()),
        "phase": "step",
        "stage": "all",
        "dispatch_ms": total_ms,
        "wire_ms": wire_ms,
        "local_ms": total_ms - wire_ms,
        "peak_memory_bytes": _peak_bytes(device),
    }


def _forget_peak(device: str) -> None:
    """Begin anew to watch how much memory is used."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)


def _peak_bytes(device: str) -> int:
    """Largest use since then: of CUDA's allocator, or of the process (resident set; each rank counts shared pages)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024
