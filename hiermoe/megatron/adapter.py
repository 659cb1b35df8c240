"""The suite's exchange behind the six hooks of Megatron's token dispatcher, and the control that reorders sums."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hiermoe.dispatch.exchange import expand_to_experts, expert_weights, return_rows, send_rows, sum_over_experts
from hiermoe.dispatch.plan import DispatchContext, DispatchPlan, make_plan
from hiermoe.topology.placement import Placement

_MAX_PENDING = 8  # plans that wait for their recomputation; without pipeline parallelism there is one


class StagedTokenDispatcher(MoETokenDispatcher):
    """Runs any scheme in the place of Megatron's dispatcher.

    A placement is a permutation of the routing map's columns made in here, so router, auxiliary loss and expert bias
    see logical experts. Routing weights are applied inside the experts, as with the stock class, so combine is a plain
    sum.

    Attributes:
        context: schemes, cluster and communicators.
        placement: where experts sit; may change between steps, and then the experts' weights must change with it.
        plan: of the latest forward.
        row_bytes: M * v of the latest forward.
        observe: called with the routing map [T, E] of every forward that is no recomputation; None for nobody.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, context: DispatchContext
    ) -> None:
        """Set up one layer.

        Args:
            config: of the layer.
            pg_collection: its process groups.
            context: what all its plans have in common.
        """
        super().__init__(config=config, pg_collection=pg_collection)
        assert config.num_moe_experts is not None
        self.context = context
        self.placement = Placement.identity(config.num_moe_experts)
        self.plan: DispatchPlan | None = None
        self.row_bytes = 0
        self.observe: Callable[[Tensor], None] | None = None
        self._half_moved = False
        self._recomputes = config.recompute_granularity is not None
        self._pending: deque[DispatchPlan] = deque(maxlen=_MAX_PENDING)
        self._hidden_shape = torch.Size()

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Make the plan, or take the one of the forward that is being recomputed. *Collective.*

        Args:
            tokens: [s, b, M] hidden states.
            routing_map: bool [T, E] with T = s * b.
            probs: [T, E] routing weights.

        Returns:
            Tokens [T, M] and the routing weights.

        Raises:
            RuntimeError: a recomputation routes other tokens than its forward did, or experts are half moved.
        """
        if self._half_moved:
            raise RuntimeError("the experts of this layer are half moved: its weights are not valid")
        self._hidden_shape = tokens.shape
        x_TM = tokens.view(-1, tokens.shape[-1])
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(tokens)
        self.plan = self._replayed(routing_map)
        if self.plan is None:
            self.row_bytes = x_TM.shape[1] * x_TM.element_size()
            self.plan = make_plan(routing_map, probs.detach(), self.placement, self.context, self.row_bytes)
            if self.observe is not None:
                self.observe(routing_map)
            if self._recomputes and not torch.is_grad_enabled():
                self._pending.append(self.plan)
        return x_TM, probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """All stages. *Collective.*

        Returns:
            Rows [R, M] that arrived, and the routing weights as they were given.
        """
        return send_rows(hidden_states, self._plan), probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Expand rows to local experts.

        Returns:
            Rows [P, M] by expert, int64 [E / G] rows of each expert (CPU), and [P] routing weights.
        """
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(hidden_states)
        plan = self._plan
        return expand_to_experts(hidden_states, plan), plan.tokens_per_expert, expert_weights(probs, plan)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum a token's local expert outputs: [R, M] from [P, M]."""
        return sum_over_experts(hidden_states, self._plan)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """All stages backwards, with partial sums at each: [T, M] from [R, M]. *Collective.*"""
        return return_rows(hidden_states, self._plan)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """The layer's shape again, and the shared experts' output where it is overlapped: [s, b, M]."""
        output = hidden_states.view(self._hidden_shape)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(hidden_states)
            self.shared_experts.post_forward_comm()
            output = output + self.shared_experts.get_output()
        return output

    @contextmanager
    def moving(self) -> Iterator[None]:
        """While experts move; if that fails, the layer refuses to be used."""
        self._half_moved = True
        yield
        self._half_moved = False

    @property
    def _plan(self) -> DispatchPlan:
        assert self.plan is not None, "dispatch_preprocess comes first"
        return self.plan

    def _replayed(self, routing_map_TE: Tensor) -> DispatchPlan | None:
        """The plan of the forward that is being recomputed, if this is a recomputation.

        Megatron's checkpointing runs a layer first without and, in backward, with gradients. A forward outside of
        backward is none, though plans of an evaluation without gradients may be waiting.
        """
        in_backward = torch._C._current_graph_task_id() != -1  # as torch's own checkpointing tells
        if not (self._pending and in_backward and torch.is_grad_enabled()):
            return None
        plan = self._pending.pop()
        if not torch.equal(plan.routing_map_TE, routing_map_TE):
            raise RuntimeError("recomputation routed other tokens than its forward: the plan cannot be replayed")
        return plan


class DelegatingDispatcher(MoETokenDispatcher):
    """Passes every hook on to another dispatcher; what wraps dispatchers starts from it."""

    def __init__(self, inner: MoETokenDispatcher) -> None:
        """Wrap ``inner``, which stays usable on its own."""
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not yet set, e.g. while being unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> Any:
        """As the inner one."""
        return self.inner.dispatch_preprocess(tokens, routing_map, probs)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> Any:
        """As the inner one."""
        return self.inner.token_dispatch(hidden_states, probs)

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> Any:
        """As the inner one."""
        return self.inner.dispatch_postprocess(hidden_states, probs)

    def combine_preprocess(self, hidden_states: Tensor) -> Any:
        """As the inner one."""
        return self.inner.combine_preprocess(hidden_states)

    def token_combine(self, hidden_states: Tensor) -> Any:
        """As the inner one."""
        return self.inner.token_combine(hidden_states)

    def combine_postprocess(self, hidden_states: Tensor) -> Any:
        """As the inner one."""
        return self.inner.combine_postprocess(hidden_states)

    def set_shared_experts(self, shared_experts: Any) -> None:
        """As the inner one."""
        self.inner.set_shared_experts(shared_experts)


class ReorderedTokenDispatcher(DelegatingDispatcher):
    """Another dispatcher that gets every rank's tokens in reverse: a control that only changes the order of sums."""

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> Any:
        """Reverse, then as the inner one."""
        self._shape = tokens.shape
        reversed_tokens = tokens.reshape(-1, 1, tokens.shape[-1]).flip(0)
        return self.inner.dispatch_preprocess(reversed_tokens, routing_map.flip(0), probs.flip(0))

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """As the inner one, then reverse."""
        return self.inner.combine_postprocess(hidden_states).flip(0).reshape(self._shape)
