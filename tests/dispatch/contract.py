"""Every system on every case, inside ranks: what the layer gave and what was sent."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hiermoe.dispatch.interposer import Transfer
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.records.status import NotApplicable
from hiermoe.topology.placement import Placement
from tests.dispatch.routings import CASES, PLACED, Answer, Routing, kept_pairs, numbers_for, placement_of, routing_of
from tests.dispatch.worlds import TRANSPORTS, World, layer_config, only_expert_parallel, stock_dispatcher, transport_of

STOCK = "stock"  # Megatron's class as it is
STOCK_WITHOUT_DROPPED = "stock_without_dropped"  # the same, given only what capacity factor 1 leaves
IDENTITY, MOVED = "identity", "moved"

Key = tuple[str, str, str]  # system, case, IDENTITY or MOVED


@dataclass(frozen=True)
class Outcome:
    """One run of a layer on one rank.

    Attributes:
        output: [T, M].
        x_gradient: [T, M].
        probs_gradient: [T, E].
        weight_gradient_LMM: of the experts in this rank's slots.
        calls: phase and transfers of every call, in order.
        scheme: that was used; empty for a stock class.
        dropped: pairs, as the plan says.
    """

    output: Tensor
    x_gradient: Tensor
    probs_gradient: Tensor
    weight_gradient_LMM: Tensor
    calls: list[tuple[str, tuple[Transfer, ...]]]
    scheme: str
    dropped: int


def run_all(rank: int, world: World, cases: tuple[str, ...] = tuple(CASES)) -> dict[Key | str, Any]:
    """All ways of moving tokens and all cases in a world; for a system that is not applicable its reason."""
    from hiermoe.dispatch.communicators import Communicators
    from hiermoe.dispatch.plan import DispatchContext
    from hiermoe.megatron.attach import new_dispatcher

    groups, hierarchy = only_expert_parallel(), world.cluster.hierarchy
    results: dict[Key | str, Any] = {}
    schemes: dict[str, tuple[DispatchScheme, ...]] = {}
    for name in TRANSPORTS:
        try:
            schemes[name] = transport_of(name).build_schemes(hierarchy)
        except NotApplicable as error:
            results[name] = str(error)
    communicators = Communicators(groups.ep, hierarchy, [s for candidates in schemes.values() for s in candidates])
    for case in cases:
        routing = routing_of(case, world.num_ranks)
        config = config_of(routing, world)
        stock = stock_dispatcher(config, groups)
        results[STOCK, case, IDENTITY] = run(stock, rank, routing)
        kept = kept_pairs(routing, 1.0)[rank]
        results[STOCK_WITHOUT_DROPPED, case, IDENTITY] = run(stock, rank, routing, chosen_TE=kept)
        for name, candidates in schemes.items():
            context = DispatchContext(candidates, world.cluster, communicators)
            try:
                dispatcher = new_dispatcher(transport_of(name), stock, config, groups, context)
            except NotApplicable as error:
                results[name] = str(error)
                continue
            results[name, case, IDENTITY] = run(dispatcher, rank, routing)
            if case in PLACED and transport_of(name).executor == "staged":
                results[name, case, MOVED] = run(dispatcher, rank, routing, placement_of(case, routing.num_experts))
    dist.barrier()
    return results


def config_of(routing: Routing, world: World) -> Any:
    return layer_config(routing.num_experts, routing.topk, 8, world.num_ranks)


def run(
    dispatcher: Any,
    rank: int,
    routing: Routing,
    placement: Placement | None = None,
    chosen_TE: Tensor | None = None,
) -> Outcome:
    """One layer forward and backward, counted."""
    from hiermoe.megatron.meter import Meter, MeteredDispatcher

    placement = placement or Placement.identity(routing.num_experts)
    if not placement.is_identity:
        dispatcher.dispatcher.placement = placement
    numbers = numbers_for(routing)
    per_rank = routing.num_experts // len(routing.ids)
    mine = placement.expert_at_S[rank * per_rank : (rank + 1) * per_rank]
    weight_LMM = numbers.weight_EMM[mine].clone().requires_grad_()
    x_TM = numbers.x[rank].clone().requires_grad_()
    probs_TE = routing.probs_TE(rank).requires_grad_()
    chosen_TE = routing.chosen_TE(rank) if chosen_TE is None else chosen_TE
    with Meter() as meter:
        output_TM = forward(MeteredDispatcher(dispatcher, 1, meter), x_TM, chosen_TE, probs_TE, weight_LMM)
        output_TM.backward(numbers.gradient[rank])
        calls = meter.drain()
    plan = calls[0].plan
    return Outcome(
        output_TM.detach(),
        gradient_of(x_TM),
        gradient_of(probs_TE),
        gradient_of(weight_LMM),
        [(call.phase, call.transfers) for call in calls],
        plan.scheme.name if plan else "",
        plan.traffic.dropped_pairs if plan else 0,
    )


def forward(dispatcher: Any, x_TM: Tensor, chosen_TE: Tensor, probs_TE: Tensor, weight_LMM: Tensor) -> Tensor:
    """The six hooks around linear experts, as Megatron's layer calls them: [T, M]."""
    rows, weights = dispatcher.dispatch_preprocess(x_TM.view(-1, 1, x_TM.shape[1]), chosen_TE, probs_TE)
    rows, weights = dispatcher.token_dispatch(rows, weights)
    rows, tokens_per_expert, weights = dispatcher.dispatch_postprocess(rows, weights)
    counts = tokens_per_expert.tolist()
    parts = zip(rows.split(counts), weights.split(counts), weight_LMM, strict=True)
    rows = torch.cat([(row @ weight.T) * factor[:, None] for row, factor, weight in parts])
    rows = dispatcher.token_combine(dispatcher.combine_preprocess(rows))
    return dispatcher.combine_postprocess(rows).view(x_TM.shape)


def gradient_of(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def numbers_fit_fp32(answer: Answer) -> bool:
    """Whether every sum, with room for any order of partial sums, is an integer that fp32 has."""
    tensors = [*answer.output, *answer.x_gradient, *answer.probs_gradient, answer.weight_gradient_EMM]
    return all(x.abs().max() < 2**20 for x in tensors if x.numel())
