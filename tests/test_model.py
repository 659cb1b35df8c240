"""conf/model/*.yaml says what the models are, and a wrong value is named in one line."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from hiermoe.model import GroupedQueryAttention, LatentAttention, ModelConfig
from hiermoe.records.project import CONF

FILES = sorted((CONF / "model").glob("*.yaml"))


def load(name: str) -> ModelConfig:
    return ModelConfig.from_yaml(CONF / "model" / f"{name}.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_model_file_is_valid_and_named_like_its_model(path: Path) -> None:
    assert ModelConfig.from_yaml(path).name == path.stem


def test_qwen3_is_the_published_model() -> None:
    model = load("qwen3_30b_a3b")
    assert (model.hidden_size, model.moe_ffn_hidden_size, model.num_experts, model.topk) == (2048, 768, 128, 8)
    assert (model.num_layers, model.num_dense_layers, model.num_shared_experts) == (48, 0, 0)
    assert model.vocab_size == 151936
    assert (model.router.score_function, model.router.num_groups, model.router.expert_bias) == ("softmax", None, False)
    attention = model.attention
    assert isinstance(attention, GroupedQueryAttention)
    assert (attention.num_heads, attention.num_query_groups, attention.head_dim) == (32, 4, 128)


def test_deepseek_v3_is_the_published_model() -> None:
    model = load("deepseek_v3")
    assert (model.hidden_size, model.moe_ffn_hidden_size, model.num_experts, model.topk) == (7168, 2048, 256, 8)
    assert (model.num_layers, model.num_dense_layers, model.num_shared_experts) == (61, 3, 1)
    assert model.num_moe_layers == 58 and model.ffn_hidden_size == 18432
    assert model.vocab_size == 129280
    router = model.router
    assert (router.score_function, router.expert_bias, router.scaling_factor) == ("sigmoid", True, 2.5)
    assert (router.num_groups, router.group_topk) == (8, 4)
    attention = model.attention
    assert isinstance(attention, LatentAttention)
    assert (attention.q_lora_rank, attention.kv_lora_rank, attention.num_heads) == (1536, 512, 128)
    assert (attention.qk_head_dim, attention.qk_pos_emb_head_dim, attention.v_head_dim) == (128, 64, 128)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("qwen3_30b_a3b", {"num_layers": 32}),
        ("deepseek_v3", {"num_layers": 6, "hidden_size": 3584, "ffn_hidden_size": 9216, "moe_ffn_hidden_size": 1024}),
    ],
)
def test_the_papers_model_says_so_and_differs_in_what_the_paper_cut_alone(name: str, changed: dict[str, int]) -> None:
    real, papers = load(name), load(f"{name}_paper")
    assert papers.label.startswith(f"{real.label} (paper's, ")
    named = {"name": papers.name, "label": papers.label, "source": papers.source}
    assert papers == real.model_copy(update=changed | named)


@pytest.mark.parametrize("name", ["qwen3_30b_a3b", "deepseek_v3"])
def test_narrow_sibling_keeps_what_decides_the_routing(name: str) -> None:
    full, narrow = load(name), load(f"{name}_narrow")
    assert narrow.trace == full.trace
    for setting in ("num_experts", "topk", "num_shared_experts", "element_bytes"):
        assert getattr(narrow, setting) == getattr(full, setting)
    for setting in ("score_function", "num_groups", "group_topk", "scaling_factor", "expert_bias", "aux_loss_type"):
        assert getattr(narrow.router, setting) == getattr(full.router, setting)
    assert full.attention is not None and narrow.attention is not None
    assert (narrow.attention.kind, narrow.attention.qk_norm) == (full.attention.kind, full.attention.qk_norm)


def test_an_expert_has_three_projections() -> None:
    assert load("qwen3_30b_a3b").expert_parameters == 3 * 2048 * 768


def test_group_limit_bounds_the_experts_of_a_token() -> None:
    assert load("deepseek_v3").usable_experts == 4 * 32
    assert load("qwen3_30b_a3b").usable_experts == 128


def test_moe_layers_are_counted_from_one_after_the_dense_layers() -> None:
    assert load("deepseek_v3_paper").moe_layers == [4, 5, 6]


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("qwen3_30b_a3b", "topk", 129, "topk=129 exceeds num_experts=128"),
        ("qwen3_30b_a3b", "num_dense_layers", 48, "num_dense_layers=48 leaves no MoE layer of num_layers=48"),
        ("qwen3_30b_a3b", "router.num_groups", 8, "num_groups=8 and group_topk=None must be given together"),
        ("qwen3_30b_a3b", "router.expert_bias", True, "expert_bias=True needs score_function=sigmoid, not softmax"),
        ("qwen3_30b_a3b", "router.aux_loss_coeff", 0.0, "aux_loss_coeff=0.0 does not fit aux_loss_type=global"),
        ("qwen3_30b_a3b", "attention.num_query_groups", 5, "num_heads=32 is not divisible by num_query_groups=5"),
        ("qwen3_30b_a3b", "attention.kind", "mla", "q_lora_rank"),
        ("qwen3_30b_a3b", "hidden_dim", 1, "Extra inputs are not permitted"),
        ("deepseek_v3", "num_experts", 250, "num_experts=250 is not divisible by num_groups=8"),
        ("deepseek_v3", "router.group_topk", 9, "group_topk=9 exceeds num_groups=8"),
        ("deepseek_v3", "router.bias_update_rate", None, "bias_update_rate=None does not fit expert_bias=True"),
        ("deepseek_v3", "num_experts", 8, "topk=8 exceeds the 4 experts of group_topk=4 groups"),
        ("deepseek_v3", "topk", 3, "topk=3 // group_topk=4, the experts that score a group, is not between 1"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(name: str, path: str, value: Any, message: str) -> None:
    settings = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    *parents, last = path.split(".")
    target = settings
    for parent in parents:
        target = target[parent]
    target[last] = value
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(settings)
    lines = [f"{error['loc']}: {error['msg']}" for error in caught.value.errors()]
    assert any(message in line for line in lines)
    assert all("\n" not in line for line in lines)


def test_a_file_without_settings_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="not a mapping"):
        ModelConfig.from_yaml(empty)


def test_importing_the_schema_imports_neither_torch_nor_megatron() -> None:
    import subprocess
    import sys

    code = (
        "import sys, hiermoe.model, hiermoe.narrow.record_config; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
