"""Moves rows along a plan: dispatch to the experts and combine back, each the other's gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hiermoe.dispatch.interposer import staged
from hiermoe.dispatch.plan import DispatchPlan, exchange


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


def _out(x_RM: Tensor, plan: DispatchPlan) -> Tensor:
    for stage in plan.stages:
        x_RM = stage.copies.copy(x_RM)
        with staged(stage.name):
            x_RM = exchange(x_RM, stage.send_rows, stage.receive_rows, stage.communicator.group)
    return plan.expand.copy(x_RM)


def _back(y_PM: Tensor, plan: DispatchPlan) -> Tensor:
    y_RM = plan.expand.sum(y_PM)
    for stage in reversed(plan.stages):
        with staged(stage.name):
            y_RM = exchange(y_RM, stage.receive_rows, stage.send_rows, stage.communicator.group)
        y_RM = stage.copies.sum(y_RM)
    return y_RM


def _unpermuted(x_P: Tensor, order_P: Tensor) -> Tensor:
    """Undo ``x[order]``."""
    result = torch.empty_like(x_P)
    result[order_P] = x_P
    return result
