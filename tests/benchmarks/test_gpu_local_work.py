"""Local work of the dispatchers on a GPU at DeepSeek-V3's sizes, against stock and against memory bandwidth.

One rank, so nothing crosses a wire. The bound is what a device copy of the rows that must
be read and written would take: dispatch writes K rows a token and reads one, combine the other way round.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._autograd import DeviceType

from hiermoe.measure.replay_job import ReplayJob
from hiermoe.model import LayerSizes
from hiermoe.policies.system import SystemConfig
from hiermoe.topology.cluster import Cluster, Level
from hiermoe.topology.peers import AlphaBeta
from tests.benchmarks.conftest import RATIOS
from tests.gpu.waits import host_waits

SYSTEMS = ("megatron", "h1", "hd1")
ROUNDS = 10
LINE = AlphaBeta(alpha_ms=0, beta_ms_per_byte=0, source="one GPU", published=False)
ONE_GPU = Cluster(
    name="one_gpu",
    description="one GPU",
    world=LINE,
    levels=(Level(name="gpu", groups=1, link_gb_per_s=1),),
)


def local_work(device: str, backend: str, tokens: int, hidden: int, experts: int, topk: int, folder: Path) -> Any:
    """Milliseconds of dispatch and combine, forward, and what they count up to.

    Returns:
        ``{system: {phase: [ms, ...]}}`` and ``{system: (kernels and copies, host waits)}`` of both together.
    """
    from hiermoe.measure.bench_layer import Question, bench_layer
    from hiermoe.megatron.meter import Meter

    timeout = timedelta(minutes=2)
    dist.init_process_group(backend, init_method=(folder / "rendezvous").as_uri(), rank=0, world_size=1)
    found: dict[str, dict[str, list[float]]] = {}
    counts: dict[str, tuple[int, int]] = {}
    meter = Meter()
    with meter:
        for name in SYSTEMS:
            job = ReplayJob(
                cluster=ONE_GPU,
                sizes=LayerSizes(experts, topk, hidden, element_bytes=2, expert_parameters=1),
                layer=1,
                counted=(),
                routing_iterations=(),
                first=0,
                routing=folder,
                timeout=timeout,
                device=device,
            )
            dispatcher, _ = bench_layer(SystemConfig.named(name), job, meter)
            found[name] = {"dispatch": [], "combine": []}

            def question(seed: int, job: ReplayJob = job) -> Question:
                generator = torch.Generator().manual_seed(seed)
                ids_TK = torch.rand(tokens, experts, generator=generator).topk(topk, dim=1).indices
                return Question.draw(ids_TK, job, generator)

            for round_ in range(ROUNDS + 1):
                assert question(round_).ask(dispatcher, job) == 0
                for call in meter.drain():
                    if round_ and call.phase in found[name]:  # the first round warms up
                        found[name][call.phase].append(call.total_ms - call.wire_ms)
            counts[name] = counted(partial(there_and_back, dispatcher, question(0)))
            meter.drain()
    dist.destroy_process_group()
    return found, counts


def there_and_back(dispatcher: Any, question: Any) -> None:
    """Dispatch and combine, forward."""
    arrived = dispatcher.dispatch(question.x_TM, question.ids_TK, question.weight_TK)
    dispatcher.combine(arrived.rows_PM, arrived.plan)


def counted(work: Callable[[], None]) -> tuple[int, int]:
    """Kernels and copies on the GPU, and times that the host waits for it without the meter's own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
    on_gpu = sum(event.device_type == DeviceType.CUDA for event in profile.events() or [])
    waits = host_waits(work)
    return on_gpu, sum(number for line, number in waits.items() if not line.startswith("interposer.py"))


def copy_ms(num_bytes: int) -> float:
    """Shortest time in which the GPU reads and writes so many bytes together."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    laps = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        laps.append(begin.elapsed_time(end))
    return min(laps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: local work on CUDA tensors cannot be timed here")
def test_local_work_on_a_gpu(benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokens, hidden, experts, topk = 4096, 7168, 256, 8
    found, counts = benchmark.pedantic(local_work, ("cuda", "nccl", tokens, hidden, experts, topk, tmp_path), rounds=1)
    bound_ms = copy_ms(tokens * (topk + 1) * hidden * 2)
    rows = request.config.stash[RATIOS].rows
    for phase in ("dispatch", "combine"):
        stock_ms = min(found["megatron"][phase])
        rows.append((f"GPU: local work of {phase}, stock Megatron", stock_ms, "memory bandwidth", bound_ms))
        for name in SYSTEMS[1:]:
            ms = min(found[name][phase])
            rows.append((f"GPU: local work of {phase}, {name}", ms, "stock Megatron", stock_ms))
            rows.append((f"GPU: local work of {phase}, {name}", ms, "memory bandwidth", bound_ms))
    stock = counts["megatron"]
    for name in SYSTEMS[1:]:
        for i, what in enumerate(("kernels and copies", "host waits")):
            row = (f"GPU: {what} of a layer, {name}", counts[name][i], "stock Megatron", stock[i])
            request.config.stash[RATIOS].counts.append(row)
