"""A dispatcher that knows no framework: experts and weights of every token in, rows and a handle out, and back.

    dispatched = dispatcher.dispatch(x_TM, ids_TK, weights_TK)
    y_PM = ...                                          # experts on dispatched.rows_PM, times dispatched.weights_P
    output_TM = dispatcher.combine(y_PM, dispatched.plan)

The layer around it never asks which system it has. `docs/plain_moe.py` is a whole layer in plain PyTorch;
`hiermoe.megatron.adapter` puts the same behind Megatron's hooks.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from hiermoe.dispatch.communicators import Communicators
from hiermoe.dispatch.exchange import expert_weights, return_rows, send_rows
from hiermoe.dispatch.plan import DispatchContext, DispatchPlan, make_plan
from hiermoe.planner.cost import check_overlap
from hiermoe.policies.protocol import StaticPolicy
from hiermoe.policies.system import SystemConfig
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.placement import Placement

_MAX_PENDING = 64  # plans that wait for their recomputation: one for every micro-batch in flight


def dispatch_context(
    system: SystemConfig, cluster: Cluster, ep_group: dist.ProcessGroup, timeout: timedelta | None = None
) -> DispatchContext:
    """What the dispatchers of all layers share. *Collective: every rank must call it.*

    Args:
        system: how tokens move.
        cluster: hierarchy and constants.
        ep_group: expert-parallel group; its rank g is the hierarchy's GPU g.
        timeout: of a collective inside the system's own process groups; None for torch's default.

    Raises:
        NotApplicable: the hierarchy has too few levels, or several chunks and nobody knows how far stages overlap.
        ValueError: ranks that do not fit the hierarchy, or a placement policy for a class that cannot follow it.
    """
    if system.executor != "staged" and not isinstance(system.build_policy(), StaticPolicy):
        raise ValueError(f"system={system.name}: only the staged executor can have experts placed elsewhere")
    schemes = system.build_schemes(cluster.hierarchy)
    for scheme in schemes:
        check_overlap(scheme, cluster)
    return DispatchContext(schemes, cluster, Communicators(ep_group, cluster.hierarchy, schemes, timeout))


@dataclass(frozen=True)
class Dispatched:
    """What arrived at the experts of one rank.

    Attributes:
        rows_PM: hidden states, grouped by local slot.
        rows_per_slot: int64 [S / G] on the CPU.
        weights_P: routing weight of every row; those who run the experts multiply with it.
        plan: the handle that combine takes; None where Megatron's own classes moved the rows.
    """

    rows_PM: Tensor
    rows_per_slot: Tensor
    weights_P: Tensor
    plan: DispatchPlan | None


class Dispatcher:
    """Runs any scheme under any placement for one layer.

    Ids are logical experts: only in here they become slots, so nobody else must know where experts sit.

    Attributes:
        context: schemes, cluster and communicators.
        placement: where experts sit; may change between steps, and then the experts' weights must change with it.
        plan: of the latest forward.
        row_bytes: M * v of the latest forward.
        observe: called with the ids [T, K] of every forward that is no recomputation; None for nobody.
        is_training: whether a forward is one of training, and not of an evaluation.
    """

    def __init__(self, context: DispatchContext, num_experts: int, recomputes: bool = False) -> None:
        """Set up one layer, every expert in the slot of its own number.

        Args:
            context: what all its plans have in common.
            num_experts: E.
            recomputes: whether forwards without gradients are run again in backward (reentrant checkpointing).
        """
        self.context = context
        self.placement = Placement.identity(num_experts)
        self.plan: DispatchPlan | None = None
        self.row_bytes = 0
        self.observe: Callable[[Tensor], None] | None = None
        self.is_training: Callable[[], bool] = lambda: True
        self._half_moved = False
        self._recomputes = recomputes
        self._pending: deque[DispatchPlan] = deque(maxlen=_MAX_PENDING)

    @property
    def local_experts(self) -> Tensor:
        """Logical expert in each slot of this rank: int64 [S / G]."""
        communicators = self.context.communicators
        return self.placement.expert_at_S.view(communicators.size, -1)[communicators.rank]

    def dispatch(self, x_TM: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """Bring every token to its experts. *Collective.* Differentiable in ``x_TM`` and ``weights_TK``.

        Args:
            x_TM: hidden states of this rank's tokens.
            ids_TK: int64 [T, K], the different experts of each token in any order; -1 where there are fewer than K.
            weights_TK: routing weights.

        Raises:
            RuntimeError: a recomputation routes other tokens than its forward did, or experts are half moved.
        """
        if self._half_moved:
            raise RuntimeError("the experts of this layer are half moved: its weights are not valid")
        plan = self._replayed(ids_TK)
        if plan is None:
            self.row_bytes = x_TM.shape[1] * x_TM.element_size()
            plan = make_plan(ids_TK, weights_TK.detach(), self.placement, self.context, self.row_bytes)
            if self.observe is not None:
                self.observe(ids_TK)
            if self._recomputes and self.is_training() and not torch.is_grad_enabled():
                self._pending.append(plan)
        self.plan = plan
        return Dispatched(send_rows(x_TM, plan), plan.rows_per_slot, expert_weights(weights_TK, plan), plan)

    def combine(self, y_PM: Tensor, plan: DispatchPlan) -> Tensor:
        """For every token the sum of what its experts gave: [T, M]. *Collective.* Differentiable.

        Partial sums at every stage. Lossy schemes leave out what they dropped.
        """
        return return_rows(y_PM, plan)

    @contextmanager
    def moving(self) -> Iterator[None]:
        """While experts move; if that fails, the layer refuses to be used."""
        self._half_moved = True
        yield
        self._half_moved = False

    def _replayed(self, ids_TK: Tensor) -> DispatchPlan | None:
        """The plan of the forward that is being recomputed, if this is a recomputation.

        Reentrant checkpointing runs a layer first without and, in backward, with gradients. A pipeline goes backward
        through its micro-batches in the order in which it went forward; who went forward without gradients for another
        reason never comes back.
        """
        in_backward = torch._C._current_graph_task_id() != -1  # as torch's own checkpointing tells
        if not (self._pending and in_backward and torch.is_grad_enabled()):
            return None
        while self._pending:
            plan = self._pending.popleft()
            if torch.equal(plan.ids_TK, ids_TK):
                return plan
        raise RuntimeError("recomputation routed other tokens than its forward: the plan cannot be replayed")
