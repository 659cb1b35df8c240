"""Builds a stock Megatron-Core GPT model from a `ModelConfig`."""

from typing import Any, cast

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from hiermoe.model import GroupedQueryAttention, LatentAttention, ModelConfig


def transformer_config(
    model: ModelConfig, *, ep_size: int, params_dtype: torch.dtype, recompute: bool = False
) -> TransformerConfig:
    """Megatron's configuration of `model`, expert-parallel over `ep_size` ranks, with no fused kernel.

    Args:
        model: What to build.
        ep_size: Ranks that share the experts of a layer.
        params_dtype: Type of weights and activations.
        recompute: Whether backward computes the MoE layers again.

    Raises:
        ValueError: The experts cannot be spread evenly over the ranks.
    """
    if model.num_experts % ep_size:
        raise ValueError(f"num_experts={model.num_experts} is not divisible by ep_size={ep_size}")
    settings = {**_shape(model), **_router(model), **NO_FUSIONS}
    settings |= {
        "expert_model_parallel_size": ep_size,
        "params_dtype": params_dtype,
        "bf16": params_dtype == torch.bfloat16,
        "recompute_granularity": "selective" if recompute else None,
        "recompute_modules": ["moe"] if recompute else None,
        "moe_router_dtype": "fp64" if params_dtype == torch.float64 else "fp32",
        "attention_softmax_in_fp32": params_dtype != torch.float64,
    }
    attention = model.attention
    if isinstance(attention, LatentAttention):
        return MLATransformerConfig(
            **settings,
            num_attention_heads=attention.num_heads,
            q_lora_rank=attention.q_lora_rank,  # type: ignore[arg-type] - None: queries are not compressed
            kv_lora_rank=attention.kv_lora_rank,
            qk_head_dim=attention.qk_head_dim,
            qk_pos_emb_head_dim=attention.qk_pos_emb_head_dim,
            v_head_dim=attention.v_head_dim,
            qk_layernorm=attention.qk_norm,
            rope_type="rope",
        )
    assert isinstance(attention, GroupedQueryAttention)
    return TransformerConfig(
        **settings,
        num_attention_heads=attention.num_heads,
        num_query_groups=attention.num_query_groups,
        kv_channels=attention.head_dim,
        qk_layernorm=attention.qk_norm,
    )


def build_model(
    model: ModelConfig,
    *,
    seq_length: int,
    ep_size: int,
    params_dtype: torch.dtype = torch.float32,
    recompute: bool = False,
) -> GPTModel:
    """A stock GPT model with local layer specs. Megatron's process groups and RNG tracker must be initialised.

    Args:
        model: What to build.
        seq_length: Longest sequence, in tokens.
        ep_size: Ranks that share the experts of a layer.
        params_dtype: Type of weights and activations.
        recompute: Whether backward computes the MoE layers again and keeps none of their activations.
    """
    config = transformer_config(model, ep_size=ep_size, params_dtype=params_dtype, recompute=recompute)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    return GPTModel(
        config=config,
        transformer_layer_spec=cast(ModuleSpec, spec),  # the model takes either, its annotation names one
        vocab_size=model.vocab_size,
        max_sequence_length=seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


NO_FUSIONS: dict[str, Any] = {
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "moe_grouped_gemm": False,
}
"""Settings of Megatron's by which it uses no kernel that only a GPU has."""


def _shape(model: ModelConfig) -> dict[str, Any]:
    shared = model.num_shared_experts * model.moe_ffn_hidden_size
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "num_moe_experts": model.num_experts,
        "moe_layer_freq": [0] * model.num_dense_layers + [1] * model.num_moe_layers,
        "moe_shared_expert_intermediate_size": shared or None,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _router(model: ModelConfig) -> dict[str, Any]:
    router = model.router
    settings: dict[str, Any] = {
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_topk": model.topk,
        "moe_router_score_function": router.score_function,
        "moe_router_num_groups": router.num_groups,
        "moe_router_group_topk": router.group_topk,
        "moe_router_topk_scaling_factor": router.scaling_factor,
        "moe_router_enable_expert_bias": router.expert_bias,
        "moe_router_load_balancing_type": router.aux_loss_type,
        "moe_aux_loss_coeff": router.aux_loss_coeff,
    }
    if router.bias_update_rate is not None:
        settings["moe_router_bias_update_rate"] = router.bias_update_rate
    return settings
