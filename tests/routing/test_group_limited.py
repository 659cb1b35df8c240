"""The group limit is DeepSeek-V3's, as Megatron-LM implements it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from scipy.stats import chisquare

from hiermoe.records.status import NotApplicable
from hiermoe.routing.synthetic import GroupLimited, group_limited_choices
from tests.routing.worlds import a_request


def deepseek_v3(**changes: Any) -> GroupLimited:
    sizes = {"num_experts": 256, "num_groups": 8, "group_topk": 4}
    return GroupLimited(a_request(**sizes), **({"bias_std": 0.0} | changes))


@pytest.mark.parametrize("bias_std", [0.0, 0.1])
def test_choice_equals_megatrons(bias_std: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NE = torch.randn(2048, 256, generator=generator)
    bias_E = torch.randn(256, generator=generator) * bias_std
    _, map_NE = topk_routing_with_score_function(
        logits_NE, topk=8, num_groups=8, group_topk=4, score_function="sigmoid", expert_bias=bias_E
    )
    ids_NK = group_limited_choices(logits_NE.sigmoid() + bias_E, topk=8, num_groups=8, group_topk=4)
    assert torch.equal(torch.zeros_like(map_NE).scatter(1, ids_NK, True), map_NE)


def obvious_choice(scores: list[float], topk: int, num_groups: int, group_topk: int) -> list[int]:
    """One token's experts, from the rule's words."""
    per_group = len(scores) // num_groups
    groups = [range(g * per_group, (g + 1) * per_group) for g in range(num_groups)]
    worth = [sum(sorted((scores[e] for e in group), reverse=True)[:2]) for group in groups]
    best = sorted(range(num_groups), key=lambda g: -worth[g])[:group_topk]
    return sorted((e for g in best for e in groups[g]), key=lambda e: -scores[e])[:topk]


@given(data=st.data(), num_groups=st.integers(1, 5), per_group=st.integers(1, 4), seed=st.integers(0, 2**16))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_choice_follows_the_rule_for_any_groups(
    data: st.DataObject, num_groups: int, per_group: int, seed: int
) -> None:
    group_topk = data.draw(st.integers(1, num_groups))
    topk = data.draw(st.integers(1, group_topk * per_group))
    generator = torch.Generator().manual_seed(seed)
    # Distinct powers of two, some negative, so that no two sums are equal.
    powers_NE = torch.rand(6, num_groups * per_group, generator=generator).argsort(1) - num_groups * per_group // 2
    scores_NE = torch.where(powers_NE % 3 == 0, -1.0, 1.0) * 2.0**powers_NE
    ids_NK = group_limited_choices(scores_NE, topk, num_groups, group_topk)
    expected = [obvious_choice(row, topk, num_groups, group_topk) for row in scores_NE.tolist()]
    assert ids_NK.tolist() == expected


def test_token_uses_no_more_groups_than_allowed() -> None:
    group_NK = deepseek_v3().step(0).expert_ids_NK // 32
    used_N = torch.zeros(len(group_NK), 8).scatter(1, group_NK, 1.0).sum(1)
    assert int(used_N.max()) == 4


def test_without_bias_all_experts_are_alike() -> None:
    source = deepseek_v3()
    ids = torch.cat([source.step(i).expert_ids_NK.flatten() for i in range(10)])
    assert chisquare(torch.bincount(ids, minlength=256).numpy()).pvalue > 1e-3


def test_bias_makes_experts_popular_for_the_whole_run() -> None:
    source = deepseek_v3(bias_std=0.1)
    load_E = torch.bincount(torch.cat([source.step(i).expert_ids_NK.flatten() for i in range(5)]), minlength=256)
    by_bias = load_E[source.bias_E.argsort()].view(8, 32).sum(1)
    assert (by_bias.diff() > 0).all()


def test_router_without_groups_is_not_applicable() -> None:
    with pytest.raises(NotApplicable, match="no group limit: num_groups is None"):
        GroupLimited(a_request(), bias_std=0.0)


def test_negative_bias_std_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bias_std=-1\.0 must be at least 0"):
        deepseek_v3(bias_std=-1.0)
