"""Stand-ins that let stock Megatron-Core train without Transformer Engine, on CPU and on GPUs alike."""

from typing import Any

import torch
import torch.nn.functional as F


def install() -> None:
    """Install them for the whole process. Safe to call again."""
    from megatron.core.models import backends
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.moe import moe_utils

    # The name is bound only if Transformer Engine can be imported, but the router's GEMM reads it always.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]

    class TorchDotProductAttention(DotProductAttention):
        """Causal attention by torch, in place of Transformer Engine's kernel.

        The stock local module keeps a [batch * heads, s, s] matrix for backward, takes no `k_channels` / `v_channels`
        and assumes that values are as wide as keys; MLA's are narrower.
        """

        def __init__(self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any):
            super().__init__(*args, **kwargs)

        def forward(
            self,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None = None,
            *_args: Any,
            **_kwargs: Any,
        ) -> torch.Tensor:
            """Causal attention. query, key, value: [s, b, heads, width]; returns [s, b, heads * value width]."""
            if attention_mask is not None:
                raise ValueError("attention here is causal over whole sequences and takes no attention_mask")
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            width = value.shape[-1]
            value = F.pad(value, (0, key.shape[-1] - width))  # torch has a fast kernel for equal widths alone
            context = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=key.shape[1] != query.shape[1]
            )
            return context[..., :width].permute(2, 0, 1, 3).flatten(2)

    backends.DotProductAttention = TorchDotProductAttention  # type: ignore[misc]
    _let_divided_optimizers_load()
    # True although Transformer Engine is missing, which makes TELinear a mock that isinstance() refuses.
    multi_latent_attention.HAVE_TE = False
    multi_latent_attention.TELinear = None  # type: ignore[misc,assignment]


def _let_divided_optimizers_load() -> None:
    """Make Megatron's distributed optimizer load what it saves with torch's Adam, which counts steps by parameter."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # warns, until told not to

    stock_state, stock_load = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict
    stock_set = DistributedOptimizer._set_main_param_and_optimizer_states
    if stock_state.__module__ == __name__:
        return

    def state_dict(self: DistributedOptimizer) -> Any:
        if not self.optimizer.state:  # stock code reads the number of steps from it
            self._init_optimizer_states_with_dummy_values()
        return stock_state(self)

    def load_state_dict(self: DistributedOptimizer, state: Any) -> None:
        stock_load(self, state)
        for of_parameter in self.optimizer.state.values():  # stock code gives all one counter, which each would raise
            of_parameter["step"] = of_parameter["step"].clone()

    def set_states(self: DistributedOptimizer, model_param: Any, tensors: Any) -> None:
        group, place = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
        stock_set(self, model_param, {"step": state["step"], **tensors})  # which is not among what was saved

    DistributedOptimizer.state_dict = state_dict  # type: ignore[method-assign]
    DistributedOptimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states  # type: ignore[method-assign]
