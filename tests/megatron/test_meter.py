"""Calls of all layers are timed and counted in order, forward and backward, and only while the meter is active."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hiermoe.megatron.standins import cpu

cpu.expect_fallbacks()

from hiermoe.megatron.attach import attach, detach, moe_layers  # noqa: E402
from hiermoe.megatron.meter import Call, Meter, MeteredDispatcher  # noqa: E402
from hiermoe.policies.protocol import PlacementPolicy  # noqa: E402
from hiermoe.policies.system import SystemConfig  # noqa: E402
from hiermoe.ranks.launch import run_ranks  # noqa: E402
from tests.dispatch import models  # noqa: E402
from tests.dispatch.worlds import DEADLINE, TIMEOUT, World, start_megatron  # noqa: E402

WORLD = World((2, 4))
SYSTEMS = ("hd2", "h2", "tutel_2dh_padded", "megatron", "megatron_reordered")
FORWARD, BACKWARD = ["dispatch", "combine"], ["combine_backward", "dispatch_backward"]
CPU = torch.device("cpu")
SLEEP_MS = 5000.0
Seen = dict[Any, Any]


def observe(rank: int) -> Seen:
    start_megatron(WORLD.num_ranks)
    gpt = models.build(models.cut_down("qwen3_30b_a3b", moe_layers=2), WORLD.num_ranks)
    seen: Seen = {"numbers": [layer.layer_number for layer in moe_layers(gpt)]}
    plain_loss, plain = models.step(gpt, rank)
    for system in SYSTEMS:
        with Meter() as meter:
            attach(gpt, system, WORLD.cluster, meter=meter)
            meter.drain()
            loss, gradients = models.step(gpt, rank)
            seen["calls", system] = _described(meter.drain())
            seen["drained", system] = meter.drain()
            models.forward(gpt, rank)
            seen["forward alone", system] = _described(meter.drain())
            with torch.no_grad():
                models.forward(gpt, rank)
            seen["no gradient", system] = _described(meter.drain())
            for _ in range(2):
                dist.all_reduce(torch.ones(3))  # of no layer
            models.step(gpt, rank)
            seen["micro-batches", system] = _described(meter.drain())
        models.step(gpt, rank)
        seen["inactive", system] = meter.drain()
        with meter:
            models.step(gpt, rank)
            seen["again", system] = len(meter.drain())
        detach(gpt)
        seen["same", system] = abs(loss - plain_loss), models.largest_difference(gradients, plain)
    return seen


def _described(calls: list[Call]) -> list[dict[str, Any]]:
    return [
        {
            "layer": call.layer,
            "phase": call.phase,
            "wire_ms": call.wire_ms,
            "total_ms": call.total_ms,
            "sum_ms": sum(transfer.wire_ms for transfer in call.transfers),
            "phases": {transfer.phase for transfer in call.transfers},
            "operations": [transfer.operation for transfer in call.transfers],
            "scheme": call.plan.scheme.name if call.plan else None,
            "plan": id(call.plan),
        }
        for call in calls
    ]


@pytest.fixture(scope="module")
def seen() -> list[Seen]:
    return run_ranks(observe, WORLD.num_ranks, (), TIMEOUT, deadline=DEADLINE, hosts=WORLD.hosts)


for_every_system = pytest.mark.parametrize("system", SYSTEMS)


def order(calls: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(call["layer"], call["phase"]) for call in calls]


@pytest.mark.slow
@for_every_system
def test_four_calls_a_layer_and_micro_batch_in_the_order_of_the_work(seen: list[Seen], system: str) -> None:
    for result in seen:
        first, second = result["numbers"]
        step = [(layer, phase) for layer in (first, second) for phase in FORWARD]
        step += [(layer, phase) for layer in (second, first) for phase in BACKWARD]
        assert order(result["calls", system]) == step
        assert result["drained", system] == []
        assert order(result["micro-batches", system]) == step
        forward = [(layer, phase) for layer in (first, second) for phase in FORWARD]
        assert order(result["forward alone", system]) == forward
        assert order(result["no gradient", system]) == forward


@pytest.mark.slow
@for_every_system
def test_the_wire_takes_part_of_the_whole_call(seen: list[Seen], system: str) -> None:
    for result in seen:
        for call in result["calls", system]:
            assert 0 < call["wire_ms"] <= call["total_ms"]
            assert call["wire_ms"] == pytest.approx(call["sum_ms"])


@pytest.mark.slow
@for_every_system
def test_a_call_holds_its_own_transfers_and_no_others(seen: list[Seen], system: str) -> None:
    for result in seen:
        for call in result["calls", system] + result["micro-batches", system]:
            assert call["phases"] == {call["phase"]}
            assert set(call["operations"]) <= {"all_to_all", "all_gather"}
            assert ("all_gather" in call["operations"]) == (call["phase"] == "dispatch")


@pytest.mark.slow
@for_every_system
def test_the_four_calls_of_a_layer_follow_one_plan(seen: list[Seen], system: str) -> None:
    for result in seen:
        calls = result["calls", system]
        stock = system.startswith("megatron")
        assert all((call["scheme"] is None) == stock for call in calls)
        for layer in result["numbers"]:
            assert len({call["plan"] for call in calls if call["layer"] == layer}) == 1
        if not stock:
            assert len({call["plan"] for call in calls}) == 2


@pytest.mark.slow
@for_every_system
def test_nothing_is_measured_while_the_meter_is_not_active(seen: list[Seen], system: str) -> None:
    for result in seen:
        assert result["inactive", system] == []
        assert result["again", system] == 8


@pytest.mark.slow
@for_every_system
def test_a_metered_layer_gives_the_same_numbers(seen: list[Seen], system: str) -> None:
    assert all(max(result["same", system]) < 1e-12 for result in seen)


def test_the_end_of_a_call_that_did_not_begin_is_an_error() -> None:
    meter = Meter()
    device = torch.device("cpu")
    with pytest.raises(RuntimeError, match="combine of layer 3 ends, but nothing had begun"):
        meter.stop(3, "combine", None, device)
    meter.start("dispatch", device)
    with pytest.raises(RuntimeError, match="combine of layer 3 ends, but dispatch had begun"):
        meter.stop(3, "combine", None, device)
    meter.stop(3, "dispatch", None, device)
    assert [(call.layer, call.phase, call.transfers) for call in meter.drain()] == [(3, "dispatch", ())]


def test_times_are_those_of_the_clock_that_was_given() -> None:
    ticks = iter([1.0, 1.25])
    meter = Meter(clock=lambda: next(ticks))
    meter.start("dispatch", torch.device("cpu"))
    meter.stop(1, "dispatch", None, torch.device("cpu"))
    assert meter.drain()[0].total_ms == 250.0


def test_what_is_left_out_is_no_part_of_a_call() -> None:
    ticks = iter([1.0, 2.0, 7.0, 9.0])
    meter = Meter(clock=lambda: next(ticks))
    with meter.left_out(CPU):  # nothing runs, and no tick is taken
        pass
    meter.start("dispatch", CPU)
    with meter.left_out(CPU):
        pass
    meter.stop(1, "dispatch", None, CPU)
    assert meter.drain()[0].total_ms == 3000.0


class Slow(PlacementPolicy):
    """Rank 0 measures for longer than a dispatch takes."""

    def measure(self, *of: Any, **named: Any) -> torch.Tensor:
        time.sleep(0 if dist.get_rank() else SLEEP_MS / 1e3)
        return torch.zeros(1)


def measure_slowly(rank: int) -> tuple[float, float]:
    start_megatron(WORLD.num_ranks)
    gpt = models.build(models.cut_down("qwen3_30b_a3b", moe_layers=1), WORLD.num_ranks)
    slow = {"policy": {"_target_": f"{__name__}.Slow"}}
    with Meter(align=dist.barrier) as meter:
        placement = attach(gpt, SystemConfig.named("hd2").model_copy(update=slow), WORLD.cluster, meter=meter)
        models.step(gpt, rank)
        return placement.measuring_ms, meter.drain()[0].total_ms


@pytest.mark.slow
def test_what_a_policy_measures_is_no_part_of_the_dispatch_of_any_rank() -> None:
    seen = run_ranks(measure_slowly, WORLD.num_ranks, (), TIMEOUT, deadline=DEADLINE, hosts=WORLD.hosts)
    measuring_ms, dispatch_ms = zip(*seen, strict=True)
    assert measuring_ms[0] >= SLEEP_MS > max(dispatch_ms)


class Ticking(torch.autograd.Function):
    """The identity; takes one amount of time forward and another backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clock: list[float], forward: float, backward: float) -> torch.Tensor:
        ctx.clock, ctx.seconds = clock, backward
        clock[0] += forward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.clock[0] += ctx.seconds
        return gradients[0], None, None, None


class TickingDispatcher:
    """Six hooks that take 1, 2, 4, 8, 16 and 32 s forward and a thousand times as long backward."""

    def __init__(self, clock: list[float]) -> None:
        self._clock = clock

    def _tick(self, x: torch.Tensor, seconds: float) -> Any:
        return Ticking.apply(x, self._clock, seconds, 1000 * seconds)

    def dispatch_preprocess(self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor) -> Any:
        return self._tick(tokens, 1), probs

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> Any:
        return self._tick(hidden_states, 2), probs

    def dispatch_postprocess(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> Any:
        return self._tick(hidden_states, 4), torch.tensor([1]), probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> Any:
        return self._tick(hidden_states, 8)

    def token_combine(self, hidden_states: torch.Tensor) -> Any:
        return self._tick(hidden_states, 16)

    def combine_postprocess(self, hidden_states: torch.Tensor) -> Any:
        return self._tick(hidden_states, 32)


def test_a_call_is_timed_from_its_first_hook_to_its_last_and_experts_belong_to_none() -> None:
    clock = [0.0]
    with Meter(clock=lambda: clock[0]) as meter:
        inner: Any = TickingDispatcher(clock)
        dispatcher = MeteredDispatcher(inner, 7, meter)
        x = torch.ones(1, 1, requires_grad=True)
        weights = torch.ones(1, 1, requires_grad=True)
        rows, probs = dispatcher.dispatch_preprocess(x, torch.ones(1, 1, dtype=torch.bool), weights)
        rows, probs = dispatcher.token_dispatch(rows, probs)
        rows, _, probs = dispatcher.dispatch_postprocess(rows, probs)
        experts: Any = Ticking.apply(rows * probs, clock, 1e6, 1e6)
        output = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(experts)))
        output.sum().backward()
        times = [(call.layer, call.phase, call.total_ms) for call in meter.drain()]
    assert times == [
        (7, "dispatch", 7e3),
        (7, "combine", 56e3),
        (7, "combine_backward", 56e6),
        (7, "dispatch_backward", 7e6),
    ]
