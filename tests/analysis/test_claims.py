"""Published numbers and rules fit together: nothing is left without a sweep, a rule or a meaning."""

from dataclasses import replace

import pytest

from hiermoe.analysis.cases import cases
from hiermoe.analysis.claims import load_claims, load_rules
from hiermoe.analysis.frames import Results
from hiermoe.analysis.quantities import METRICS
from hiermoe.records.schema import SOURCES
from hiermoe.runs.compose import sweep_names

CLAIMS, RULES = load_claims(), load_rules()


def test_every_metric_has_one_rule_and_no_rule_is_left_over() -> None:
    assert {claim.metric for claim in CLAIMS} == set(RULES.metrics)


def test_every_metric_is_computed_or_declared_not_testable() -> None:
    for metric, rule in RULES.metrics.items():
        assert metric in METRICS or "simulated" in rule.not_testable, metric
        assert set(rule.not_testable) | set(rule.constructed) <= set(SOURCES)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.claim)
def test_claim_is_answered_by_a_sweep_that_exists(claim) -> None:
    assert claim.sweep(RULES) in sweep_names()
    assert isinstance(claim.wanted, dict)


def test_headline_names_claims_that_exist() -> None:
    assert set(RULES.headline) <= {claim.claim for claim in CLAIMS}


def test_condition_that_nothing_understands_is_refused() -> None:
    with pytest.raises(ValueError, match="is not understood"):
        _ = replace(CLAIMS[0], condition="on Tuesdays").wanted
    with pytest.raises(ValueError, match="no sweep answers"):
        replace(CLAIMS[0], where="Fig. 99").sweep(RULES)


def found(name: str, results: Results) -> list:
    claim = next(claim for claim in CLAIMS if claim.claim == name)
    return list(cases(claim, RULES, results))


def test_claim_of_both_models_has_a_case_for_each_model_and_routing(results: Results) -> None:
    keys = [(case.model, case.routing) for case in found("F11-hiermoe-hd2smart", results)]
    assert sorted(keys) == [
        ("deepseek_v3_paper", "group_limited"), ("deepseek_v3_paper", "recorded"), ("deepseek_v3_paper", "uniform"),
        ("qwen3_30b_a3b_paper", "recorded"), ("qwen3_30b_a3b_paper", "uniform"),
    ]  # fmt: skip


def test_claim_over_several_baselines_has_a_case_for_each(results: Results) -> None:
    of_one = [
        case for case in found("A-a2a", results) if (case.model, case.routing) == ("qwen3_30b_a3b_paper", "uniform")
    ]
    assert [case.baseline for case in of_one] == ["hd2_moe_smart", "megatron", "tutel_2dh"]


def test_what_else_a_sweep_varies_tells_cases_apart(results: Results) -> None:
    uniform = [case for case in found("VE-gamma", results) if case.routing == "uniform"]
    assert [case.condition for case in uniform] == [f"gamma {g:.1f}" for g in (5, 7, 10, 13, 16, 19)]
    assert {case.condition for case in found("F13-hd-best", results)} == {"a6000_4x8", "a6000_1x8"}


def test_setting_without_a_baseline_of_its_own_is_compared_with_the_baselines_sweep(results: Results) -> None:
    for case in found("VE-max-plain", results):
        assert [run.system for run in case.baselines] == ["hd_moe"]
        assert case.systems[0].swept["max_function"] == "plain"


def test_cells_of_two_nodes_are_marked_as_derived(results: Results) -> None:
    assert all(case.has_derived_constants for case in found("T4-hd2-G16", results))
    assert not any(case.has_derived_constants for case in found("T4-hd2-G8", results))


def test_every_metric_can_be_judged_from_every_source_or_says_why_not() -> None:
    rules = load_rules()
    for source in SOURCES:
        for claim in load_claims():
            rule = rules.metrics[claim.metric]
            assert claim.metric in METRICS or source in rule.not_testable, (claim.claim, source)
