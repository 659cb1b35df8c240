"""Training runs of a second or two."""

from typing import Any

from hiermoe.model import ModelConfig
from hiermoe.narrow.training_config import TrainingConfig
from hiermoe.records.project import CONF

_SMALL = {
    "vocab_size": 512,
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 32,
    "moe_ffn_hidden_size": 16,
    "num_experts": 8,
    "topk": 2,
}
_ROUTER = {"qwen3_30b_a3b": {}, "deepseek_v3": {"num_groups": 4, "group_topk": 2}}


def tiny_training(
    model: str, cache_dir: str, *, router: dict[str, Any] | None = None, **changes: Any
) -> TrainingConfig:
    """A small sibling of `qwen3_30b_a3b` or `deepseek_v3`, on two ranks."""
    settings = ModelConfig.from_yaml(CONF / "model" / f"{model}_narrow.yaml").model_dump() | _SMALL
    settings["router"] |= _ROUTER[model] | (router or {})
    values = {
        "model": settings,
        "seq_length": 16,
        "sequences_per_step": 8,
        "learning_rate": 1.0e-3,
        "lr_warmup_steps": 0,
        "seed": 1,
        "ep_size": 2,
        "data_parallel": 1,
        "dtype": "fp32",
        "recompute": False,
        "corpus": {"name": "library", "kinds": {"Python": {"files": {"python": "**/*.py"}}}},
        "corpus_files": 24,
        "cache_dir": cache_dir,
    }
    return TrainingConfig.model_validate(values | changes)
