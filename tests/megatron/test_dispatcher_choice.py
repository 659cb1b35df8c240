"""The dimension is chosen anew in every micro-batch, by all ranks alike, and the plan is frozen until its backward."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hiermoe.megatron.standins import cpu
from hiermoe.model import RowBytes

cpu.expect_fallbacks()

from hiermoe.dispatch.communicators import HOST_VARIABLE, played_hosts  # noqa: E402
from hiermoe.planner.cost import choose_scheme  # noqa: E402
from hiermoe.planner.counts import count_routing  # noqa: E402
from hiermoe.planner.scheme import every_dimension  # noqa: E402
from hiermoe.ranks.launch import run_ranks  # noqa: E402
from hiermoe.topology.cluster import Cluster, Level  # noqa: E402
from hiermoe.topology.peers import AlphaBeta  # noqa: E402
from hiermoe.topology.placement import Placement  # noqa: E402
from tests.dispatch import contract  # noqa: E402
from tests.dispatch.routings import WIDTH, Routing, choose, numbers_for, placement_of, routing_of  # noqa: E402
from tests.dispatch.worlds import (  # noqa: E402
    DEADLINE,
    TIMEOUT,
    TRANSPORTS,
    World,
    layer_config,
    start_megatron,
    stock_dispatcher,
    transport_of,
)

RANKS, EXPERTS, TOPK = 8, 16, 6
REPLICA = World((2, 4))  # two of them make the 8 ranks
SAME_CASE, OTHER_CASE = "zipf", "even"
Seen = dict[Any, Any]


pytestmark = pytest.mark.slow


def _cost(alpha_ms: float, beta_ms_per_byte: float) -> AlphaBeta:
    return AlphaBeta(alpha_ms=alpha_ms, beta_ms_per_byte=beta_ms_per_byte, source="chosen so that each d wins")


def cluster() -> Cluster:
    """HD1 is cheap to start and dear a byte; HD3 the other way around."""
    levels = (
        Level(name="node", groups=2, link_gb_per_s=1.0, inter=_cost(1, 1e-3), intra=_cost(1, 5e-3)),
        Level(name="half", groups=4, link_gb_per_s=1.0, inter=_cost(2.5, 1e-3), intra=_cost(1, 1e-3)),
        Level(name="gpu", groups=8, link_gb_per_s=1.0),
    )
    return Cluster(name="each d wins", description="", world=_cost(1, 1e-2), levels=levels)


def micro_batches() -> list[Routing]:
    generator = torch.Generator().manual_seed(1)
    tokens = [[1] * 8, [8] * 8, [2] * 8, [1, 0, 3, 1, 2, 1, 1, 1], [10, 8, 9, 8, 0, 20, 8, 8], [0] * 7 + [1]]
    return [choose(counts, torch.ones(EXPERTS), TOPK, generator) for counts in tokens]


def expected_dimensions(row_bytes: int) -> list[int]:
    hierarchy = cluster().hierarchy
    counts = [count_routing(r.step, Placement.identity(EXPERTS), hierarchy) for r in micro_batches()]
    return [
        choose_scheme(every_dimension(hierarchy), c, cluster(), RowBytes.alike(row_bytes)).scheme.dimension
        for c in counts
    ]


def observe(rank: int) -> Seen:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from hiermoe.dispatch.dispatcher import dispatch_context
    from hiermoe.megatron.attach import new_dispatcher

    start_megatron(RANKS)
    groups = get_default_pg_collection()
    config = layer_config(EXPERTS, TOPK, WIDTH, RANKS)
    stock = stock_dispatcher(config, groups)
    system = transport_of("hd_moe")
    context = dispatch_context(system, cluster(), groups.ep)
    dispatcher: Any = new_dispatcher(system, stock, config, groups, context)
    seen: Seen = {"dimensions": [], "wide": [], "same": []}
    for routing in micro_batches():
        mine, theirs = contract.run(dispatcher, rank, routing), contract.run(stock, rank, routing)
        seen["dimensions"].append(dispatcher.plan.scheme.dimension)
        seen["same"].append(_equal(mine, theirs))
        x = torch.zeros(len(routing.ids[rank]), 1, 8 * WIDTH, dtype=torch.float64)
        dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(x, routing.chosen_TE(rank), routing.probs_TE(rank)))
        seen["wide"].append(dispatcher.plan.scheme.dimension)
    seen["interleaved"] = _all_forward_then_all_backward(dispatcher, stock, rank)
    seen["changed"] = _changed_in_between(dispatcher, stock, rank)
    seen["replicas"] = _replicas(rank)
    return seen


def _equal(a: contract.Outcome, b: contract.Outcome) -> bool:
    names = ("output", "x_gradient", "probs_gradient", "weight_gradient_LMM")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


class _Layer:
    """One micro-batch of linear experts: first forward, later backward."""

    def __init__(self, dispatcher: Any, rank: int, routing: Routing) -> None:
        numbers = numbers_for(routing)
        per_rank = EXPERTS // RANKS
        self.x_TM = numbers.x[rank].clone().requires_grad_()
        self.probs_TE = routing.probs_TE(rank).requires_grad_()
        self.weight_LMM = numbers.weight_EMM[rank * per_rank : (rank + 1) * per_rank].clone().requires_grad_()
        self._gradient = numbers.gradient[rank]
        self.output = contract.forward(dispatcher, self.x_TM, routing.chosen_TE(rank), self.probs_TE, self.weight_LMM)

    def backward(self) -> list[Tensor]:
        self.output.backward(self._gradient)
        return [self.output, *(contract.gradient_of(x) for x in (self.x_TM, self.probs_TE, self.weight_LMM))]


def _all_forward_then_all_backward(dispatcher: Any, stock: Any, rank: int) -> list[bool]:
    """Forwards of all micro-batches before the first backward: each must use its own plan."""
    expected = [_Layer(stock, rank, routing).backward() for routing in micro_batches()]
    layers = [_Layer(dispatcher, rank, routing) for routing in micro_batches()]
    got = [layer.backward() for layer in layers]
    return [all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(got, expected, strict=True)]


class _ChangingDispatcher:
    """After dispatch, everything that a decision could depend on becomes something else."""

    def __init__(self, dispatcher: Any, context: Any, placement: Placement) -> None:
        self._inner, self._context, self._placement = dispatcher, context, placement

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def dispatch_postprocess(self, *arguments: Any) -> Any:
        result = self._inner.dispatch_postprocess(*arguments)
        inner = self._inner.dispatcher
        inner.context, inner.placement = self._context, self._placement
        return result


def _changed_in_between(dispatcher: Any, stock: Any, rank: int) -> list[tuple[int, bool]]:
    results = []
    inner = dispatcher.dispatcher
    context, placement = inner.context, inner.placement
    other_placement = placement_of("zipf", EXPERTS)
    for dimension, routing in enumerate(micro_batches()[:3]):
        expected = _Layer(stock, rank, routing).backward()
        others = tuple(s for s in context.schemes if s.dimension == dimension % 3 + 1)
        changing = _ChangingDispatcher(dispatcher, replace(context, schemes=others), other_placement)
        layer = _Layer(changing, rank, routing)
        assert inner.placement is other_placement
        got = layer.backward()
        equal = all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        results.append((dispatcher.plan.scheme.dimension, equal))
        inner.context, inner.placement = context, placement
    return results


def _replicas(rank: int) -> dict[str, Any]:
    """EP = 4 and DP = 2: each replica of the experts dispatches its own routing."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from hiermoe.dispatch.dispatcher import dispatch_context
    from hiermoe.megatron.attach import new_dispatcher

    replica, place = divmod(rank, REPLICA.num_ranks)
    os.environ[HOST_VARIABLE] = f"replica{replica}-{played_hosts(REPLICA.cluster.hierarchy)[place]}"
    start_megatron(REPLICA.num_ranks)
    groups = get_default_pg_collection()
    routing = routing_of((SAME_CASE, OTHER_CASE)[replica], REPLICA.num_ranks)
    config = contract.config_of(routing, REPLICA)
    stock = stock_dispatcher(config, groups)
    expected = contract.run(stock, place, routing)
    results: dict[str, Any] = {}
    for name in TRANSPORTS:
        if not REPLICA.runs(name):
            continue
        system = transport_of(name)
        context = dispatch_context(system, REPLICA.cluster, groups.ep)
        got = contract.run(new_dispatcher(system, stock, config, groups, context), place, routing)
        members = {member for _, transfers in got.calls for t in transfers for member in t.members}
        results[name] = members, "dropped pairs" if got.dropped else _equal(got, expected)
    return results


@pytest.fixture(scope="module")
def seen() -> list[Seen]:
    return run_ranks(observe, RANKS, (), TIMEOUT, deadline=DEADLINE, hosts=played_hosts(cluster().hierarchy))


def test_every_dimension_wins_in_some_micro_batch() -> None:
    narrow, wide = expected_dimensions(WIDTH * 4), expected_dimensions(WIDTH * 64)
    assert set(narrow) == {1, 2, 3}
    assert narrow != wide  # the bytes of a row count


def test_all_ranks_choose_in_every_micro_batch_what_the_planner_chooses(seen: list[Seen]) -> None:
    for result in seen:
        assert result["dimensions"] == expected_dimensions(WIDTH * 4)
        assert result["wide"] == expected_dimensions(WIDTH * 64)  # 8 times as many elements of twice the size
        assert all(result["same"])


def test_each_backward_follows_the_plan_of_its_own_forward(seen: list[Seen]) -> None:
    assert all(result["interleaved"] == [True] * len(micro_batches()) for result in seen)


def test_combine_and_backward_use_the_plan_though_candidates_and_placement_have_changed(seen: list[Seen]) -> None:
    for result in seen:
        assert result["changed"] == [(d, True) for d in expected_dimensions(WIDTH * 4)[:3]]


@pytest.mark.parametrize("system", [name for name in TRANSPORTS if REPLICA.runs(name)])
def test_replicas_of_experts_dispatch_each_for_itself(seen: list[Seen], system: str) -> None:
    for rank, result in enumerate(seen):
        members, equal = result["replicas"][system]
        first = rank // REPLICA.num_ranks * REPLICA.num_ranks
        assert members == set(range(first, first + REPLICA.num_ranks))
        assert equal is True or (equal, system) == ("dropped pairs", "tutel_2dh_padded_cf1")
