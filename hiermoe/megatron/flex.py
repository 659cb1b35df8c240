"""Megatron's flex dispatcher, where one of its GPU back ends is installed."""

import copy

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import fused_a2a
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from hiermoe.records.status import NotApplicable

_BACKENDS = {"deepep": "HAVE_DEEP_EP", "hybridep": "HAVE_HYBRIDEP"}  # flag in Megatron that tells if it can be imported


def flex_dispatcher(
    stock: MoETokenDispatcher, config: TransformerConfig, pg_collection: ProcessGroupCollection
) -> MoETokenDispatcher:
    """A flex dispatcher in the place of a layer's stock one. Its own kernels move the bytes, so none are counted.

    Raises:
        NotApplicable: no back end is installed.
    """
    installed = [name for name, flag in _BACKENDS.items() if getattr(fused_a2a, flag, False)]
    if not installed:
        raise NotApplicable(f"Megatron's flex dispatcher needs a GPU and {' or '.join(_BACKENDS)}; none is installed")
    assert isinstance(stock, MoEAlltoAllTokenDispatcher)
    flex_config = copy.copy(config)
    flex_config.moe_token_dispatcher_type = "flex"
    flex_config.moe_flex_dispatcher_backend = installed[0]  # type: ignore[assignment]
    return MoEFlexTokenDispatcher(stock.num_local_experts, stock.local_expert_indices, flex_config, pg_collection)
