"""Layers are divided among ranks for decisions: everyone ends where all would if each decided for itself."""

from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hiermoe.megatron.standins import cpu

cpu.expect_fallbacks()

from hiermoe.megatron.deciding import decide, policy_states  # noqa: E402
from hiermoe.model import RowBytes  # noqa: E402
from hiermoe.planner.scheme import every_dimension  # noqa: E402
from hiermoe.policies.hierd_es import HierDESPolicy  # noqa: E402
from hiermoe.policies.net import NetPolicy  # noqa: E402
from hiermoe.policies.protocol import PlacementPolicy, PlacementUpdate, StepContext  # noqa: E402
from hiermoe.policies.search.search_policy import SearchPolicy  # noqa: E402
from hiermoe.ranks.launch import run_ranks  # noqa: E402
from hiermoe.records.status import NotApplicable  # noqa: E402
from hiermoe.topology.cluster import Cluster  # noqa: E402
from hiermoe.topology.placement import Placement  # noqa: E402

RANKS, EXPERTS, LAYERS, STEPS = 4, 16, 6, 4
TIMEOUT, DEADLINE = timedelta(minutes=2), timedelta(minutes=5)
POLICIES: dict[str, tuple[type[PlacementPolicy], dict[str, Any]]] = {
    "swaps": (HierDESPolicy, {"interval": 2, "max_swaps": 2}),
    "net": (NetPolicy, {"interval": 1, "first": 10_000, "longest": 10_000}),
    # Few cells, so that ranks must learn how many sets take part; a few experts a step, so that a target is remembered.
    "search": (SearchPolicy, {"first_search": 2, "interval": 2, "window": 2, "max_moved": 2, "steps": 20, "cells": 16}),
}
Seen = dict[Any, Any]


def layer_of(number: int, policy: PlacementPolicy) -> Any:
    """What deciding needs of a layer."""
    cluster = Cluster.named("a6000_4x8").reduced(RANKS)
    scheme = every_dimension(cluster.hierarchy)[0]
    layer = SimpleNamespace(
        number=number,
        policy=policy,
        measured=None,
        keeps_copies=False,
        iteration=0,
        dispatcher=SimpleNamespace(placement=Placement.identity(EXPERTS)),
        votes=lambda: torch.ones(1, dtype=torch.int64),
    )
    layer.context = lambda votes: StepContext(layer.iteration, cluster, scheme, RowBytes.alike(1024), 1000)
    return layer


def alone(policy: type[PlacementPolicy]) -> type[PlacementPolicy]:
    """The same policy, but every rank decides for itself."""
    return type(policy.__name__, (policy,), {"shared_state": lambda self: None})


def watched(policy: PlacementPolicy) -> PlacementPolicy:
    """It counts its decisions."""
    real, counted = policy.decide, []
    policy.decided = counted  # type: ignore[attr-defined]
    policy.decide = lambda *x: (counted.append(1), real(*x))[1]  # type: ignore[method-assign]
    return policy


def measure(layer: Any, iteration: int) -> None:
    hierarchy = layer.context(None).cluster.hierarchy
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(1000 * layer.number + 10 * iteration + rank)
    popular_E = torch.rand(EXPERTS, generator=torch.Generator().manual_seed(layer.number)) ** 4
    ids_NK = torch.multinomial(popular_E.expand(200, -1), 3, generator=generator)
    layer.iteration = iteration
    source_N = torch.full((len(ids_NK),), rank)
    layer.measured = layer.policy.measure(ids_NK, source_N, layer.dispatcher.placement, hierarchy, iteration)


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def train(layers: list[Any], first: int, last: int) -> Iterator[dict[int, list[int]]]:
    for iteration in range(first, last):
        for layer in layers:
            measure(layer, iteration)
        updates = decide(dict(enumerate(layers)), world())
        for place, update in updates.items():
            layers[place].dispatcher.placement = update.placement
        yield {place: update.placement.slot_E.tolist() for place, update in updates.items()}


def plain(states: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    return [{name: tensor.tolist() for name, tensor in state.items()} for state in states]


def decide_both_ways(rank: int) -> Seen:
    seen: Seen = {}
    for name, (policy, arguments) in POLICIES.items():
        for how, kind in (("divided", policy), ("alone", alone(policy))):
            layers = [layer_of(n, watched(kind(**arguments))) for n in range(LAYERS)]
            seen["updates", name, how] = list(train(layers, 0, STEPS))
            seen["states", name, how] = plain(policy_states(layers, world))
            seen["shared", name, how] = plain([layer.policy.shared_state() or {} for layer in layers])
            seen["decided", name, how] = [len(layer.policy.decided) for layer in layers]
    return seen


@pytest.fixture(scope="module")
def ranks() -> list[Seen]:
    return run_ranks(decide_both_ways, RANKS, (), TIMEOUT, deadline=DEADLINE)


@pytest.mark.parametrize("name", POLICIES)
def test_every_rank_learns_what_it_would_have_decided_itself(name: str, ranks: list[Seen]) -> None:
    expected = ranks[0]["updates", name, "alone"]
    assert sum(map(len, expected)) > LAYERS / 2
    for rank in ranks:
        assert rank["updates", name, "divided"] == rank["updates", name, "alone"] == expected


@pytest.mark.parametrize("name", POLICIES)
def test_each_layer_is_decided_by_one_rank(name: str, ranks: list[Seen]) -> None:
    for number, rank in enumerate(ranks):
        assert rank["decided", name, "divided"] == [STEPS * (place % RANKS == number) for place in range(LAYERS)]
        assert rank["decided", name, "alone"] == [STEPS] * LAYERS


@pytest.mark.parametrize("name", POLICIES)
def test_every_rank_gets_what_the_deciding_one_remembers(name: str, ranks: list[Seen]) -> None:
    expected = ranks[0]["states", name, "alone"]
    assert all(rank["states", name, "divided"] == expected for rank in ranks)
    assert any(expected) == (name != "swaps")


def test_ranks_that_only_measure_learn_what_measuring_depends_on(ranks: list[Seen]) -> None:
    bits = [{"zero_bits": state["zero_bits"]} for state in ranks[0]["states", "search", "alone"]]
    assert any(bit["zero_bits"] for bit in bits)
    assert all(rank["shared", "search", "divided"] == bits for rank in ranks)


class Broken(HierDESPolicy):
    """Its decisions fail."""

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        raise ArithmeticError("no way out")


class Unfit(HierDESPolicy):
    """It does not apply."""

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        raise NotApplicable("no such thing")


class Content(HierDESPolicy):
    """It likes what it measures."""

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        return None


class Copying(HierDESPolicy):
    """It makes copies."""

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        copies = Placement(torch.arange(EXPERTS).repeat(2), torch.arange(EXPERTS).expand(RANKS, -1))
        return PlacementUpdate(copies, None)


def say(rank: int) -> Seen:
    from hiermoe.dispatch.interposer import Interposer

    seen: Seen = {}
    for name, policy in (("broken", Broken), ("copying", Copying), ("unfit", Unfit)):
        layers = [layer_of(n, HierDESPolicy() if n < 2 else policy()) for n in range(3)]
        try:
            next(train(layers, 0, 1))
        except (RuntimeError, ValueError) as error:
            seen[name] = type(error).__name__, str(error), error.__notes__[0]
    for policy in (Content, HierDESPolicy):
        layers = [layer_of(n, policy()) for n in range(3)]
        with Interposer() as interposer:
            updates = next(train(layers, 0, 1))
            seen[len(updates)] = [x.operation for x in interposer.drain()]
    return seen


@pytest.fixture(scope="module")
def said() -> list[Seen]:
    return run_ranks(say, RANKS, (), TIMEOUT, deadline=DEADLINE)


def test_a_rank_that_cannot_decide_stops_every_rank(said: list[Seen]) -> None:
    for rank in said:
        assert rank["broken"][:2] == ("RuntimeError", "layer 2, decided on by rank 2: ArithmeticError: no way out")
        assert "in decide" in rank["broken"][2]
        assert rank["copying"][0] == "ValueError" and "sums no gradients of copies" in rank["copying"][1]
        assert rank["unfit"][:2] == ("NotApplicable", "layer 2, decided on by rank 2: no such thing")


def test_what_is_said_is_heard_from_each_rank_that_decides(said: list[Seen]) -> None:
    for rank in said:
        assert rank[0] == ["all_reduce", "all_reduce"]
        assert rank[3] == ["all_reduce", "all_reduce"] + 3 * ["broadcast", "broadcast"]
