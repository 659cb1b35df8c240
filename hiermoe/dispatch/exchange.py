"""Moves rows along a plan: dispatch to the experts and combine back, each the other's gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hiermoe.dispatch.interposer import staged
from hiermoe.dispatch.plan import DispatchPlan, StagePlan, begin_exchange, exchange
from hiermoe.dispatch.waves import Leg, in_waves


def send_rows(x_TM: Tensor, plan: DispatchPlan) -> Tensor:
    """Dispatch: [T, M] of this rank's tokens to [P, M], one row per (token, local slot), grouped by slot.

    *Collective.* Differentiable; its gradient is `return_rows`. One node of the graph, so that what overlaps with its
    backward begins together with it.
    """
    return _Linear.apply(x_TM, lambda x: _out(x, plan), lambda g: _back(g, plan))  # type: ignore[return-value]


def return_rows(y_PM: Tensor, plan: DispatchPlan) -> Tensor:
    """Combine: [P, M] to [T, M], summed on this rank and at every stage before rows travel on.

    *Collective.* Differentiable; its gradient is `send_rows`.
    """
    return _Linear.apply(y_PM, lambda y: _back(y, plan), lambda g: _out(g, plan))  # type: ignore[return-value]


def expert_weights(weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
    """Routing weights of the rows that `send_rows` gives: [P] from this rank's [T, K].

    They came with the plan's metadata, so going forward nothing is sent. *Collective in backward*: their gradients
    travel back to the ranks whose routers they belong to.
    """

    def gradient(g_P: Tensor) -> Tensor:
        g_P = _unpermuted(g_P, plan.by_expert_P)
        for stage in reversed(plan.stages):
            with staged(stage.name):
                g_P = exchange(g_P, stage.receive_pairs, stage.send_pairs, stage.communicator.group)
            g_P = _unpermuted(g_P, stage.pair_order_P)
        flat = g_P.new_zeros(weights_TK.numel() + 1)  # one more for padding
        flat[plan.pair_index_P] = g_P
        return flat[:-1].view_as(weights_TK)

    return _Linear.apply(weights_TK, lambda _: plan.weights_P.clone(), gradient)  # type: ignore[return-value]


class _Linear(torch.autograd.Function):
    """A linear map and its adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.adjoint = adjoint
        return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.adjoint(gradients[0]), None, None


def _out(x_TM: Tensor, plan: DispatchPlan) -> Tensor:
    def leg(stage: StagePlan) -> Leg:
        def begin(x_RM: Tensor, beside_others: bool) -> Callable[[], Tensor]:
            sent, group = stage.copies.copy(x_RM), stage.communicator.group
            with staged(stage.name):
                return begin_exchange(sent, stage.send_rows, stage.receive_rows, group, beside_others)

        return Leg(begin)

    return plan.expand.copy(in_waves(x_TM, [leg(stage) for stage in plan.stages], plan.scheme.chunks))


def _back(y_PM: Tensor, plan: DispatchPlan) -> Tensor:
    def leg(stage: StagePlan) -> Leg:
        def begin(y_RM: Tensor, beside_others: bool) -> Callable[[], Tensor]:
            group = stage.communicator.group
            with staged(stage.name):
                return begin_exchange(y_RM, stage.receive_rows, stage.send_rows, group, beside_others)

        return Leg(begin, stage.copies.sum)

    legs = [leg(stage) for stage in reversed(plan.stages)]
    return in_waves(plan.expand.sum(y_PM), legs, plan.scheme.chunks)


def _unpermuted(x_P: Tensor, order_P: Tensor) -> Tensor:
    """Undo ``x[order]``."""
    result = torch.empty_like(x_P)
    result[order_P] = x_P
    return result
