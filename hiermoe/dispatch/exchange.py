"""Moves rows along a plan: dispatch to the experts and combine back, each the other's gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hiermoe.dispatch.interposer import staged
from hiermoe.dispatch.plan import DispatchPlan, exchange


def send_rows(x_TM: Tensor, plan: DispatchPlan) -> Tensor:
    """All stages of dispatch: [T, M] of this rank's tokens to [R, M], one row per token that has an expert here.

    *Collective.* Differentiable; its gradient is `return_rows`. Padded schemes and schemes of pairs deliver one row per
    pair.
    """
    return _linear(x_TM, lambda x: _out(x, plan), lambda g: _back(g, plan))


def return_rows(y_RM: Tensor, plan: DispatchPlan) -> Tensor:
    """All stages of combine: [R, M] partial sums to [T, M], summed at every stage before they travel on.

    *Collective.* Differentiable; its gradient is `send_rows`.
    """
    return _linear(y_RM, lambda y: _back(y, plan), lambda g: _out(g, plan))


def expand_to_experts(x_RM: Tensor, plan: DispatchPlan) -> Tensor:
    """One row per (token, local expert), grouped by expert: [P, M] from [R, M]. Local."""
    return _linear(x_RM, plan.expand.copy, plan.expand.sum)


def sum_over_experts(y_PM: Tensor, plan: DispatchPlan) -> Tensor:
    """Sum of a token's local expert outputs: [R, M] from [P, M]. Local."""
    return _linear(y_PM, plan.expand.sum, plan.expand.copy)


def expert_weights(probs_TE: Tensor, plan: DispatchPlan) -> Tensor:
    """Routing weights of the expanded rows: [P] from this rank's [T, E].

    They came with the plan's metadata, so going forward nothing is sent. *Collective in backward*: their gradients
    travel back to the ranks whose routers they belong to.
    """

    def gradient(g_P: Tensor) -> Tensor:
        g_P = _unpermuted(g_P, plan.by_expert_P)
        for stage in reversed(plan.stages):
            with staged(stage.name):
                g_P = exchange(g_P, stage.receive_pairs, stage.send_pairs, stage.communicator.group)
            g_P = _unpermuted(g_P, stage.pair_order_P)
        flat = g_P.new_zeros(probs_TE.numel() + 1)  # one more for padding
        flat[plan.pair_index_P] = g_P
        return flat[:-1].view_as(probs_TE)

    return _linear(probs_TE, lambda _: plan.weights_P.clone(), gradient)


class _Linear(torch.autograd.Function):
    """A linear map and its adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.adjoint = adjoint
        return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.adjoint(gradients[0]), None, None


def _linear(x: Tensor, run: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> Tensor:
    result = _Linear.apply(x, run, adjoint)
    assert isinstance(result, Tensor)
    return result


def _out(x_RM: Tensor, plan: DispatchPlan) -> Tensor:
    for stage in plan.stages:
        x_RM = stage.copies.copy(x_RM)
        with staged(stage.name):
            x_RM = exchange(x_RM, stage.send_rows, stage.receive_rows, stage.communicator.group)
    return x_RM


def _back(y_RM: Tensor, plan: DispatchPlan) -> Tensor:
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
