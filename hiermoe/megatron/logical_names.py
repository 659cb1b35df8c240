"""Makes Megatron's own checkpointing name experts as the router does, wherever a placement has put them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.moe.moe_layer import MoELayer

from hiermoe.dispatch.dispatcher import Dispatcher


def name_experts_logically(layer: MoELayer, dispatcher: Dispatcher) -> None:
    """Replace the sharded state dict of a layer's experts, until the attribute is deleted."""
    experts: Any = layer.experts
    stock: Callable[..., dict[str, Any]] = experts.sharded_state_dict

    def sharded_state_dict(prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        if not dispatcher.placement.is_identity:
            _check_format(metadata or {})
        expert_at = dispatcher.placement.expert_at_S.tolist()
        by_slot = stock(prefix, sharded_offsets, metadata)
        return {name: _renumbered(one, len(sharded_offsets), expert_at) for name, one in by_slot.items()}

    experts.sharded_state_dict = sharded_state_dict


def _check_format(metadata: dict[str, Any]) -> None:
    """Refuse formats that do not ask here which expert is where.

    Raises:
        ValueError: says what to do.
    """
    if metadata.get("singleton_local_shards", False):
        raise ValueError("checkpoints with a tensor for each expert (singleton_local_shards) cannot be renumbered")
    optimizers = metadata.get("distrib_optim_sharding_type")
    if optimizers not in (None, *DistributedOptimizer.checkpoint_fully_reshardable_formats):
        raise ValueError(
            f"experts have moved, and a checkpoint with {optimizers} keeps the optimizer's state by its place in "
            "memory: save with --dist-ckpt-optim-fully-reshardable, or call go_home() before"
        )


def _renumbered(one: Any, axis: int, expert_at: list[int]) -> Any:
    """The same tensor or object, at the place of its expert on the axis on which stock code has it by slot."""
    if isinstance(one, ShardedTensorFactory):
        build = one.build_fn

        def build_renumbered(*arguments: Any) -> Any:
            return [_renumbered(part, axis, expert_at) for part in build(*arguments)]

        return replace(one, build_fn=build_renumbered)
    offset = list(one.global_offset)
    offset[axis] = expert_at[offset[axis]]
    return replace(one, global_offset=tuple(offset))
