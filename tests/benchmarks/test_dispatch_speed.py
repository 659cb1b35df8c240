"""How much local work the dispatchers do, as ratios to the stock one: ``pytest tests/benchmarks --benchmark-only``.

8 gloo ranks on three levels, uniform routing. What counts is CPU time of the calling thread, so waiting for others and
sharing cores do not; collectives are left out. Systems take turns in every round.
"""

import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from hiermoe.dispatch.communicators import played_hosts
from hiermoe.measure.replay_job import ReplayJob
from hiermoe.model import LayerSizes
from hiermoe.policies.system import SystemConfig
from hiermoe.ranks.launch import run_ranks
from hiermoe.topology.cluster import Cluster
from tests.benchmarks.conftest import RATIOS

RANKS, EXPERTS, TOPK, TOKENS, HIDDEN, ROUNDS = 8, 128, 8, 512, 1024, 5
SYSTEMS = ("megatron", "h1", "h2", "h3", "hd1", "hd2", "hd3", "hd_moe", "tutel_2dh", "tutel_2dh_padded")
TIMEOUT = timedelta(minutes=2)
CALLS = {"dispatch": ("dispatch", "combine_backward"), "combine": ("combine", "dispatch_backward")}


def job() -> ReplayJob:
    return ReplayJob(
        cluster=Cluster.named("a6000_4x8").reduced(RANKS),
        sizes=LayerSizes(EXPERTS, TOPK, HIDDEN, element_bytes=2, expert_parameters=1),
        layer=1,
        counted=(),
        routing_iterations=(),
        first=0,
        routing=Path(),
        timeout=TIMEOUT,
    )


def local_work(rank: int) -> dict[str, dict[str, list[float]]]:
    """CPU milliseconds of this rank's local work: by system and call, one a round."""
    from hiermoe.measure.bench_layer import Question, bench_layer
    from hiermoe.megatron.meter import Meter

    meter = Meter(time.thread_time)
    shared = job()
    dispatchers = {system: bench_layer(SystemConfig.named(system), shared, meter)[0] for system in SYSTEMS}
    found: dict[str, dict[str, list[float]]] = {system: defaultdict(list) for system in SYSTEMS}
    with meter:
        for round_ in range(ROUNDS + 1):
            generator = torch.Generator().manual_seed(round_ * RANKS + rank)
            ids_TK = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOPK, dim=1).indices
            for system in SYSTEMS:
                question = Question.draw(ids_TK, shared, generator)
                assert question.ask(dispatchers[system], shared) == 0
                for call in meter.drain():
                    if round_:  # the first one warms up
                        found[system][call.phase].append(call.total_ms - call.wire_ms)
    return {system: dict(calls) for system, calls in found.items()}


def test_local_work_of_dispatch_and_combine(benchmark: Any, request: pytest.FixtureRequest) -> None:
    results = benchmark.pedantic(run_ranks, (local_work, RANKS, (), TIMEOUT), {"hosts": HOSTS}, rounds=1)
    for name, phases in CALLS.items():
        ms = {
            system: sum(sum(min(result[system][phase]) for result in results) / RANKS for phase in phases)
            for system in SYSTEMS
        }
        for system in SYSTEMS[1:]:
            benchmark.extra_info[f"{name} {system} over stock"] = ms[system] / ms["megatron"]
            request.config.stash[RATIOS].rows.append(
                (f"local work of {name}, {system}", ms[system], "stock Megatron", ms["megatron"])
            )


HOSTS = played_hosts(Cluster.named("a6000_4x8").reduced(RANKS).hierarchy)
