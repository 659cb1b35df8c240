"""A recomputed layer replays its plan: same gradients, no new decision, and an error where it routes differently."""

from typing import Any

import pytest
import torch

from hiermoe.megatron.standins import cpu

cpu.expect_fallbacks()

from hiermoe.megatron.attach import attach, detach  # noqa: E402
from hiermoe.megatron.meter import Call, Meter  # noqa: E402
from hiermoe.ranks.launch import run_ranks  # noqa: E402
from tests.dispatch import models  # noqa: E402
from tests.dispatch.worlds import DEADLINE, TIMEOUT, World, start_megatron  # noqa: E402

pytestmark = pytest.mark.slow
WORLD = World((2, 4))
SYSTEMS = ("h2", "hd1", "hd2", "hd_moe", "tutel_2dh", "tutel_2dh_padded", "megatron", "megatron_reordered")
STAGED = tuple(system for system in SYSTEMS if not system.startswith("megatron"))
RECOMPUTED = {
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
PART = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}  # MoE layers are not recomputed
Seen = dict[Any, Any]


def observe(rank: int) -> Seen:
    start_megatron(WORLD.num_ranks)
    seen: Seen = {}
    model = models.cut_down("deepseek_v3", moe_layers=2)
    plain = models.build(model, WORLD.num_ranks)
    for how, settings in RECOMPUTED.items():
        gpt = models.build(model, WORLD.num_ranks, **settings)
        for system in SYSTEMS:
            expected = _step(plain, system, rank)[:2]
            loss, gradients, calls = _step(gpt, system, rank)
            seen["gradients", how, system] = loss - expected[0], models.largest_difference(gradients, expected[1])
            seen["calls", how, system] = [_described(call, calls) for call in calls]
        seen["micro-batches", how] = _backward_in_reverse(gpt, plain, rank)
        seen["rerouted", how] = _rerouted(gpt, rank)
        seen["after evaluation", how] = _train_after_evaluation(gpt, plain, rank)
    seen["after evaluation", "part"] = _train_after_evaluation(
        models.build(model, WORLD.num_ranks, **PART), plain, rank
    )
    return seen


def _step(gpt: torch.nn.Module, system: str, rank: int) -> tuple[float, dict[str, torch.Tensor], list[Call]]:
    with Meter() as meter:
        attach(gpt, system, WORLD.cluster, meter=meter)
        loss, gradients = models.step(gpt, rank)
        detach(gpt)
        return loss, gradients, meter.drain()


def _described(call: Call, calls: list[Call]) -> dict[str, Any]:
    return {
        "layer": call.layer,
        "phase": call.phase,
        "sent": [(transfer.operation, transfer.kind) for transfer in call.transfers],
        "plan": next(number for number, other in enumerate(calls) if other.plan is call.plan),
    }


def _backward_in_reverse(gpt: torch.nn.Module, plain: torch.nn.Module, rank: int) -> float:
    """Two forwards, then their backwards, the last one first; against one after the other without recomputation."""
    results = []
    for model in (gpt, plain):
        attach(model, "hd2", WORLD.cluster)
        models.forget_loads(model)
        model.zero_grad()
        if model is plain:
            for seed in (rank, rank + 100):
                models.forward(model, seed).backward()
        else:
            losses = [models.forward(model, seed) for seed in (rank, rank + 100)]
            for loss in reversed(losses):
                loss.backward()
        results.append(models.gradients(model))
        detach(model)
    return models.largest_difference(*results)


def _rerouted(gpt: torch.nn.Module, rank: int) -> str:
    attach(gpt, "hd2", WORLD.cluster)
    loss = models.forward(gpt, rank)
    for router in models.routers(gpt):
        router.weight.data.neg_()
    try:
        loss.backward()
        return "no error"
    except RuntimeError as error:
        return str(error)
    finally:
        for router in models.routers(gpt):
            router.weight.data.neg_()
        detach(gpt)


def _train_after_evaluation(gpt: torch.nn.Module, plain: torch.nn.Module, rank: int) -> float:
    attach(gpt, "hd2", WORLD.cluster)
    gpt.eval()
    with torch.no_grad():
        models.forward(gpt, rank + 50)
    gpt.train()
    try:
        gradients = models.step(gpt, rank)[1]
    finally:
        detach(gpt)
    return models.largest_difference(gradients, models.step(plain, rank)[1])


@pytest.fixture(scope="module")
def seen() -> list[Seen]:
    return run_ranks(observe, WORLD.num_ranks, (), TIMEOUT, deadline=DEADLINE, hosts=WORLD.hosts)


in_both_ways = pytest.mark.parametrize("how", RECOMPUTED)


@pytest.mark.slow
@in_both_ways
@pytest.mark.parametrize("system", SYSTEMS)
def test_recomputation_gives_the_same_gradients(seen: list[Seen], how: str, system: str) -> None:
    for result in seen:
        assert result["gradients", how, system] == (0.0, 0.0)  # to the bit: it is the same arithmetic


@in_both_ways
@pytest.mark.parametrize("system", STAGED)
def test_the_recomputation_moves_rows_and_exchanges_neither_counts_nor_metadata(
    seen: list[Seen], how: str, system: str
) -> None:
    for result in seen:
        calls = result["calls", how, system]
        for layer in {call["layer"] for call in calls}:
            mine = [call for call in calls if call["layer"] == layer]
            assert [call["phase"] for call in mine] == [
                "dispatch", "combine", "dispatch", "combine", "combine_backward", "dispatch_backward"
            ]  # fmt: skip
            first, again = mine[0], mine[2]
            assert ("all_gather", "metadata") in first["sent"]
            assert ("all_to_all", "metadata") in first["sent"]
            assert again["sent"] == [sent for sent in first["sent"] if sent == ("all_to_all", "payload")]
            assert again["sent"]
            assert mine[3]["sent"] == mine[1]["sent"]


@in_both_ways
@pytest.mark.parametrize("system", STAGED)
def test_forward_recomputation_and_backward_follow_the_same_plan_object(
    seen: list[Seen], how: str, system: str
) -> None:
    for result in seen:
        calls = result["calls", how, system]
        plans = {layer: {call["plan"] for call in calls if call["layer"] == layer} for layer in (2, 3)}
        assert all(len(numbers) == 1 for numbers in plans.values())
        assert plans[2] != plans[3]


@in_both_ways
def test_of_several_forwards_each_backward_finds_its_own_plan(seen: list[Seen], how: str) -> None:
    assert all(result["micro-batches", how] < 1e-12 for result in seen)


@in_both_ways
def test_a_recomputation_that_routes_differently_is_an_error_on_every_rank(seen: list[Seen], how: str) -> None:
    for result in seen:
        assert result["rerouted", how] == (
            "recomputation routed other tokens than its forward: the plan cannot be replayed"
        )


@pytest.mark.parametrize("how", [*RECOMPUTED, "part"])
def test_an_evaluation_in_between_leaves_no_plan_that_training_would_replay(seen: list[Seen], how: str) -> None:
    assert all(result["after evaluation", how] < 1e-12 for result in seen)
