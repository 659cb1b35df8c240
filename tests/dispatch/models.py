"""The narrow siblings cut down to what a test needs, built inside ranks."""

from typing import Any

import torch

from hiermoe.megatron.standins import cpu
from hiermoe.model import ModelConfig
from hiermoe.records.project import CONF

KINDS = ("qwen3_30b_a3b", "deepseek_v3")  # softmax router; sigmoid, expert bias, group limit and a shared expert
VOCABULARY = 64


def cut_down(kind: str, moe_layers: int = 1, hidden: int = 32) -> ModelConfig:
    """32 experts, top 8 as in full size."""
    settings = ModelConfig.from_yaml(CONF / "model" / f"{kind}_narrow.yaml").model_dump()
    dense = min(settings["num_dense_layers"], 1)
    small = {
        "num_layers": dense + moe_layers,
        "num_dense_layers": dense,
        "hidden_size": hidden,
        "ffn_hidden_size": 32,
        "moe_ffn_hidden_size": 16,
        "num_experts": 32,
        "vocab_size": VOCABULARY,
    }
    return ModelConfig.model_validate({**settings, **small})


def build(model: ModelConfig, ep_size: int, dtype: torch.dtype = torch.float64, with_spec: Any = None, **changes: Any):
    """A GPT model of this rank, the same in every call.

    Args:
        model: what to build.
        ep_size: ranks that share the experts.
        dtype: of weights and activations.
        with_spec: changes the block spec.
        changes: settings of Megatron's configuration.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from hiermoe.narrow.models import transformer_config

    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    with cpu.cuda_means_cpu():
        config = transformer_config(model, ep_size=ep_size, params_dtype=dtype)
        for name, value in changes.items():
            assert hasattr(config, name)
            setattr(config, name, value)
        spec: Any = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
        gpt = GPTModel(
            config=config,
            transformer_layer_spec=with_spec(spec) if with_spec else spec,
            vocab_size=model.vocab_size,
            max_sequence_length=16,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
    gpt = gpt.to(dtype)
    for router in routers(gpt):
        if router.expert_bias is not None:
            bias = torch.randn(model.num_experts, generator=torch.Generator().manual_seed(2))
            router.expert_bias = bias * 0.05  # so that the bias changes choices
    return gpt


def routers(gpt: torch.nn.Module) -> list[Any]:
    from megatron.core.transformer.moe.router import TopKRouter

    return [module for module in gpt.modules() if isinstance(module, TopKRouter)]


def forget_loads(gpt: torch.nn.Module) -> None:
    """Reset what routers carry from one forward to the next."""
    for router in routers(gpt):
        for name in ("global_tokens_per_expert", "ga_steps", "local_tokens_per_expert"):
            if getattr(router, name, None) is not None:
                getattr(router, name).zero_()


def forward(gpt: torch.nn.Module, seed: int) -> torch.Tensor:
    """A loss in fp64 of 2 sequences of 8 tokens."""
    tokens = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(seed))
    return gpt(tokens, torch.arange(8).expand(2, -1), attention_mask=None).double().pow(2).mean()


def step(gpt: torch.nn.Module, seed: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a forward and backward."""
    forget_loads(gpt)
    gpt.zero_grad()
    loss = forward(gpt, seed)
    loss.backward()
    return loss.item(), gradients(gpt)


def gradients(gpt: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in gpt.named_parameters() if p.grad is not None}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative to the largest entry of each tensor."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp(min=1e-30)) for n in b)
