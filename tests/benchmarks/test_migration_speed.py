"""How fast a pair of experts of Qwen3-30B-A3B's size changes places: ``pytest tests/benchmarks --benchmark-only``.

Two gloo ranks on this machine. Beside it, in turns, the same bytes as one plain message each way.
"""

import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hiermoe.model import ModelConfig
from hiermoe.policies.price_of_moving import STATE_BYTES_PER_PARAMETER, WEIGHT_BYTES_PER_PARAMETER
from hiermoe.ranks.launch import run_ranks
from hiermoe.records.project import CONF
from hiermoe.topology.placement import Placement
from tests.benchmarks.conftest import RATIOS

ROUNDS = 8
TIMEOUT = timedelta(minutes=1)
MODEL = ModelConfig.from_yaml(CONF / "model" / "qwen3_30b_a3b.yaml")
WHAT = {"weights": WEIGHT_BYTES_PER_PARAMETER, "full state": STATE_BYTES_PER_PARAMETER}


def expert(what: str) -> tuple[list[torch.nn.Parameter], Any]:
    """Parameters in bf16, and an optimizer with masters and moments of them; None for weights alone."""
    hidden, inner = MODEL.hidden_size, MODEL.moe_ffn_hidden_size
    parameters = [
        torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in ((2 * inner, hidden), (hidden, inner))
    ]
    if what == "weights":
        return parameters, None
    state = {}
    for parameter in parameters:
        parameter.main_param = parameter.detach().float()  # type: ignore[attr-defined]
        moments = {name: torch.ones(parameter.shape) for name in ("exp_avg", "exp_avg_sq")}
        state[parameter.main_param] = moments  # type: ignore[attr-defined]
    return parameters, SimpleNamespace(optimizer=SimpleNamespace(state=state))


def exchange(rank: int) -> dict[str, dict[str, float]]:
    """Shortest milliseconds of a move and of a plain exchange."""
    from hiermoe.megatron.migration import migrate

    group: Any = dist.group.WORLD
    home, away = Placement.of_slots(torch.tensor([0, 1])), Placement.of_slots(torch.tensor([1, 0]))
    found = {}
    for what, bytes_per_parameter in WHAT.items():
        parameters, optimizer = expert(what)
        size = bytes_per_parameter * sum(x.numel() for x in parameters)
        outgoing, incoming = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)

        def move(parameters: Any = parameters, optimizer: Any = optimizer, size: int = size) -> None:
            assert migrate([parameters], optimizer, home, away, group) == size

        def plain(outgoing: torch.Tensor = outgoing, incoming: torch.Tensor = incoming) -> None:
            operations = [dist.P2POp(dist.isend, outgoing, 1 - rank), dist.P2POp(dist.irecv, incoming, 1 - rank)]
            for work in dist.batch_isend_irecv(operations):
                work.wait()

        laps: dict[str, list[float]] = {"move": [], "plain": []}
        for _ in range(ROUNDS + 1):  # the first one warms up
            for name, function in (("move", move), ("plain", plain)):
                dist.barrier()
                started = time.perf_counter()
                function()
                dist.barrier()
                laps[name].append((time.perf_counter() - started) * 1e3)
        found[what] = {name: min(times[1:]) for name, times in laps.items()} | {"bytes": size}
    return found


def test_a_pair_of_experts_changes_places(benchmark: Any, request: pytest.FixtureRequest) -> None:
    seen = benchmark.pedantic(run_ranks, (exchange, 2, (), TIMEOUT), rounds=1)[0]
    for what, found in seen.items():
        rate = found["bytes"] / 1e3 / found["move"]  # MB/s each way
        benchmark.extra_info[f"{what}: MB/s each way"] = rate
        benchmark.extra_info[f"{what}: plain over move"] = found["plain"] / found["move"]
        name = f"swap two Qwen3 experts, {what}, {found['bytes'] / 1e6:.0f} MB each way, {rate:.0f} MB/s (elapsed)"
        request.config.stash[RATIOS].rows.append((name, found["move"], "plain send and receive", found["plain"]))
