"""Makes Megatron's own checkpointing name experts as the router does, wherever a placement has put them."""

from types import SimpleNamespace
from typing import Any

from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer

from hiermoe.dispatch.dispatcher import Dispatcher


def name_experts_logically(layer: MoELayer, dispatcher: Dispatcher) -> None:
    """Replace the sharded state dict of a layer's experts, until the attribute is deleted.

    Raises:
        ValueError: experts of a kind whose checkpoints could not be named so.
    """
    experts = layer.experts
    if not isinstance(experts, SequentialMLP):
        raise ValueError(f"checkpoints of {type(experts).__name__} with moved experts are not supported")
    first = layer.local_expert_indices[0]

    def sharded_state_dict(prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        expert_at = dispatcher.placement.expert_at_S.tolist()
        result = {}
        for i, expert in enumerate(experts.local_experts):
            # Stock code numbers the only expert of this stand-in by its rank among E ranks.
            group = SimpleNamespace(size=lambda: len(expert_at), rank=lambda i=i: expert_at[first + i])
            alone = SimpleNamespace(
                local_experts=[expert], num_local_experts=1, ep_group=group, dp_group=experts.dp_group
            )
            part = SequentialMLP.sharded_state_dict(alone, prefix, sharded_offsets, metadata)  # type: ignore[arg-type]
            stem = f"{prefix}local_experts."
            result |= {key.replace(f"{stem}0.", f"{stem}{i}.", 1): value for key, value in part.items()}
        return result

    experts.sharded_state_dict = sharded_state_dict  # type: ignore[method-assign]
