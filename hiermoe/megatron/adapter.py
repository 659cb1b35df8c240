"""The suite's dispatcher behind the six hooks of Megatron's token dispatcher."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hiermoe.dispatch.dispatcher import Dispatched, Dispatcher
from hiermoe.dispatch.plan import DispatchContext, DispatchPlan


class StagedTokenDispatcher(MoETokenDispatcher):
    """Runs any scheme in the place of Megatron's dispatcher.

    Router, auxiliary loss and expert bias see logical experts. Routing weights are applied inside the experts, as with
    the stock class, so combine is a plain sum.

    Attributes:
        dispatcher: what does the work.
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
        self.dispatcher = Dispatcher(context, config.num_moe_experts, config.recompute_granularity is not None)
        self._hidden_shape = torch.Size()
        self._ids_TK: Tensor | None = None
        self._dispatched: Dispatched | None = None

    @property
    def local_expert_indices(self) -> list[int]:
        """Logical expert in each slot of this rank, by the name that Megatron's classes use."""
        return self.dispatcher.local_experts.tolist()

    @property
    def plan(self) -> DispatchPlan | None:
        """Of the latest forward."""
        return self.dispatcher.plan

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the routing map into ids.

        Args:
            tokens: [s, b, M] hidden states.
            routing_map: bool [T, E] with T = s * b.
            probs: [T, E] routing weights.

        Returns:
            Tokens [T, M] and the routing weights [T, K].

        Raises:
            ValueError: the map does not give every token K experts.
        """
        self._hidden_shape = tokens.shape
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(tokens)
        self._ids_TK = chosen_experts(routing_map, self.config.moe_router_topk)
        return tokens.view(-1, tokens.shape[-1]), probs.gather(1, self._ids_TK)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Make the plan, or take the one of the forward that is being recomputed, and follow it. *Collective.*

        Returns:
            Rows [P, M] by expert, and their routing weights [P].
        """
        assert self._ids_TK is not None, "dispatch_preprocess comes first"
        self._dispatched = self.dispatcher.dispatch(hidden_states, self._ids_TK, probs)
        return self._dispatched.rows_PM, self._dispatched.weights_P

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows, int64 [E / G] rows of each expert (CPU), and the routing weights."""
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(hidden_states)
        assert self._dispatched is not None, "token_dispatch comes first"
        return hidden_states, self._dispatched.rows_per_slot, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Nothing."""
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """The sum of each token's expert outputs: [T, M] from [P, M]. *Collective.*"""
        assert self.plan is not None, "token_dispatch comes first"
        return self.dispatcher.combine(hidden_states, self.plan)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """The layer's shape again, and the shared experts' output where it is overlapped: [s, b, M]."""
        output = hidden_states.view(self._hidden_shape)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(hidden_states)
            self.shared_experts.post_forward_comm()
            output = output + self.shared_experts.get_output()
        return output


def chosen_experts(routing_map_TE: Tensor, topk: int) -> Tensor:
    """Experts of every token, rising: int64 [T, K].

    Raises:
        ValueError: the map does not give every token K experts.
    """
    num_tokens, num_experts = routing_map_TE.shape
    if not bool((routing_map_TE.sum(dim=1) == topk).all()):
        choices = int(routing_map_TE.sum())
        raise ValueError(f"the routing map has {choices} choices of {num_tokens} tokens, not {topk} of each")
    return (torch.nonzero_static(routing_map_TE.view(-1), size=num_tokens * topk) % num_experts).view(-1, topk)
