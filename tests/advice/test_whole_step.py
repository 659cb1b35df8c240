"""The whole step from what a GPU computes with, beside the step from AlltoAll's share."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from hiermoe.advice.answer_tables import Answer
from hiermoe.advice.assessment import Assessed, Assessment
from hiermoe.advice.case import Case
from hiermoe.advice.inputs import resolve
from hiermoe.analysis.whole_step import Compute, step_speedup, whole_step_ms
from hiermoe.model import LatentAttention, ModelConfig
from tests.advice.conftest import ITERATIONS, TOKENS, config_of

DENSE, TFLOPS = 20_000_000, 5.0
PROFILE = {"tflops": 10.0, "mfu": 0.5, "expert_mfu": 0.25, "dense_parameters": DENSE, "hidden": 0.25}


def profiled(assessment: Assessment, trace_file: Path, **changes: float) -> Assessment:
    """With a profile, which changes no count."""
    question = resolve(config_of(trace=str(trace_file), compute={**PROFILE, **changes}))
    return replace(assessment, case=question.cases[0])


def test_a_step_by_hand() -> None:
    assert whole_step_ms(6.0, 4.0) == 10.0
    assert whole_step_ms(6.0, 4.0, 0.5) == 8.0
    assert whole_step_ms(1.0, 4.0, 0.5) == 4.0  # no more is hidden than there is computation
    assert whole_step_ms(np.array([6.0, 1.0]), np.array([4.0, 4.0]), 1.0).tolist() == [6.0, 4.0]
    compute = Compute(2_000_000, 3_000_000, dense_tflops=100, expert_tflops=50, hidden=0)
    # 6 operations a weight and row: 1000 x 12e6 at 1e14 a second, 500 x 18e6 at 5e13.
    assert compute.layer_ms(1000, np.array([500, 0])) == pytest.approx([0.12 + 0.18, 0.12])


def test_share_and_step_follow_from_the_profile(assessment: Assessment, case: Case, trace_file: Path) -> None:
    found = profiled(assessment, trace_file)
    flat, moving = found.flat, found.named("hiermoe")
    operations, expert = 6 / 1e9, 3 * 4096 * 512

    def busiest_rows(one: Assessed) -> list[int]:
        return [
            int(case.judging.counts(i, one.placements[case.layer], case.cluster.hierarchy).pairs_GG.sum(0).max())
            for i in range(ITERATIONS // 2, ITERATIONS)
        ]

    def step_ms(one: Assessed) -> np.ndarray:
        compute = operations * (TOKENS * DENSE / TFLOPS + np.array(busiest_rows(one)) * expert / (TFLOPS / 2))
        sent = one.held_out.step_ms(case.cluster)
        return compute + sent - np.minimum(0.25 * sent, compute)

    share = found.share(case.cluster)
    exposed = 1 - operations * (
        TOKENS * DENSE / TFLOPS + np.mean(busiest_rows(flat)) * expert / (TFLOPS / 2)
    ) / np.mean(step_ms(flat))
    assert share == pytest.approx(exposed) and 0 < exposed < 1
    moved_ms = 7.0
    flat_ms, moving_ms = (one.held_out.step_ms(case.cluster).mean() for one in (flat, moving))
    communication = (moving_ms + moved_ms) / flat_ms
    expected = step_ms(flat).mean() / (step_ms(moving).mean() + moved_ms)
    assert found.step_speedup(moving, communication) == pytest.approx(expected)


def test_a_system_that_leaves_experts_alone_gains_what_the_share_says(assessment: Assessment, trace_file: Path) -> None:
    """Its computation is the flat one's, so the two ways agree as long as as much is hidden."""
    found = profiled(assessment, trace_file)
    answer = Answer.of(found)
    share = answer.share
    assert share is not None
    assert answer.own_step("hd2") == pytest.approx(step_speedup(share, answer.communication("hd2")))
    assert answer.step_now("hd2") == f"{answer.own_step('hd2'):.2f}"


def test_more_that_is_hidden_and_slower_gpus_leave_less_to_gain(assessment: Assessment, trace_file: Path) -> None:
    shares = [
        profiled(assessment, trace_file, **changes).share(assessment.case.cluster)
        for changes in ({"hidden": 0.0}, {}, {"hidden": 0.9}, {"hidden": 0.9, "tflops": 1.0})
    ]
    assert all(a is not None and b is not None and a > b for a, b in pairwise(shares))


def test_a_stated_share_stays_what_it_was(assessment: Assessment) -> None:
    stated = replace(assessment, case=replace(assessment.case, share=0.4))
    assert stated.share(assessment.case.cluster) == 0.4 and assessment.share(assessment.case.cluster) is None
    assert stated.step_speedup(stated.flat, 0.5) == step_speedup(0.4, 0.5) == 1 / 0.8
    assert assessment.step_speedup(assessment.flat, 0.5) is None


@pytest.mark.parametrize(("name", "active"), [("deepseek_v3", 37.0e9), ("qwen3_30b_a3b", 3.3e9)])
def test_weights_beside_experts_add_up_to_what_models_are_known_for(name: str, active: float) -> None:
    """Active parameters as published; the embedding is looked up and no weight that is multiplied with."""
    model = ModelConfig.named(name)
    experts = model.topk * model.expert_parameters * model.num_moe_layers
    embedding = model.vocab_size * model.hidden_size
    assert model.dense_parameters * model.num_moe_layers + experts + embedding == pytest.approx(active, rel=0.03)


def test_weights_beside_experts_by_hand() -> None:
    """One dense layer and two with experts, two heads of 4 for one group, one shared expert, a router."""
    sizes = {"num_layers": 3, "num_dense_layers": 1, "hidden_size": 8, "ffn_hidden_size": 32, "vocab_size": 10}
    attention = {"kind": "gqa", "num_heads": 2, "num_query_groups": 1, "head_dim": 4, "qk_norm": False}
    experts = {"moe_ffn_hidden_size": 16, "num_experts": 4, "topk": 2, "num_shared_experts": 1}
    model = ModelConfig.model_validate({"name": "hand", **sizes, **experts, "attention": attention})
    attended = 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8)  # queries, keys and values, output
    assert model.dense_parameters == (attended + 3 * 8 * 32 + 2 * (3 * 8 * 16 + 4 * 8) + 8 * 10) // 2
    latent = {"kind": "mla", "num_heads": 2, "q_lora_rank": 3, "kv_lora_rank": 5, "qk_head_dim": 4, "v_head_dim": 6}
    multi = LatentAttention.model_validate({**latent, "qk_pos_emb_head_dim": 2, "qk_norm": True})
    assert multi.parameters(8) == 8 * 3 + 3 * 2 * 6 + 8 * (5 + 2) + 5 * 2 * (4 + 6) + 2 * 6 * 8


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"compute": {"tflops": 10.0}}, "tflops=10.0 and mfu=None must be given together"),
        ({"compute": {"hidden": 0.5}}, "tflops=... is missing"),
        ({"compute": {"tflops": 10.0, "mfu": 1.5}}, "less than or equal to 1"),
        ({"compute": PROFILE, "share": 0.4}, "compute= predicts it: give one"),
        ({"compute": {"tflops": 10.0, "mfu": 0.5}}, "compute.dense_parameters=... is missing"),
    ],
)
def test_a_profile_that_does_not_fit(trace_file: Path, changes: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        resolve(config_of(trace=str(trace_file), **changes))
