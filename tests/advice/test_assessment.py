"""Numbers against slow, obvious references and against the simulation of whole runs."""

from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hiermoe.advice.assessment import Assessment, assess, break_even_steps
from hiermoe.advice.case import Case
from hiermoe.advice.held_out import count_held_out, crossing_rows
from hiermoe.advice.inputs import resolve
from hiermoe.advice.recommendation import STAY_BELOW_GAIN, option, recommend
from hiermoe.advice.sensitivity import assumptions, published_times, sensitivity, tokens_needed
from hiermoe.advice.systems import BASELINE, candidates
from hiermoe.measure.predict import simulate
from hiermoe.measure.workload import Workload
from hiermoe.planner.cost import ALLTOALLS_PER_STEP, choose_scheme
from hiermoe.policies.price_of_moving import STATE_BYTES_PER_PARAMETER, price_migration
from hiermoe.records.project import CONF
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from hiermoe.topology.scaling import scaled
from tests.advice.conftest import ITERATIONS, config_of


def whole_run(case: Case, assessment: Assessment, name: str):
    candidate = assessment.named(name).candidate
    system = candidate.system
    workload = Workload(
        system, candidate.schemes, system.build_policy, case.cluster, case.routing, case.layer, case.sizes,
        case.iterations,
    )  # fmt: skip
    run = simulate(workload)
    return run[run["phase"] == "step"]


@pytest.mark.parametrize("name", ["megatron", "hd1", "hd2", "hd_moe", "tutel_2dh_padded_cf1"])
def test_fixed_experts_take_what_the_simulated_run_takes(name: str, case: Case, assessment: Assessment) -> None:
    own = assessment.named(name)
    steps = whole_run(case, assessment, name).query("counted")
    np.testing.assert_allclose(own.held_out.step_ms(case.cluster), steps["predicted_ms"], rtol=1e-12)
    assert own.held_out.dimensions(case.cluster) == pytest.approx(
        steps["dimension"].value_counts(normalize=True).to_dict()
    )
    assert sum(own.held_out.mean_stages(case.cluster).values()) == pytest.approx(steps["predicted_ms"].mean())


def test_rows_of_other_bytes_each_way_are_priced_as_a_run_prices_them(trace_file: Path, case: Case) -> None:
    wire = {"dispatch": "fp8_with_scales", "choice_bytes": 12}
    own = resolve(config_of(trace=str(trace_file), wire=wire)).cases[0]
    assessment = assess(own, *candidates(own.cluster, ("hd2",)))
    for name in ("megatron", "hd2"):
        steps, held_out = whole_run(own, assessment, name).query("counted"), assessment.named(name).held_out
        np.testing.assert_allclose(held_out.step_ms(own.cluster), steps["predicted_ms"], rtol=1e-12)
    before, after = (count_held_out(x, assessment.flat.candidate.schemes, x.first_places, [0]) for x in (case, own))
    row = 4096 + 32 * 4 + own.sizes.topk * 12
    np.testing.assert_allclose(
        after.crossing(own.cluster), before.crossing(case.cluster) * (row + 3 * 8192) / (4 * 8192)
    )


@pytest.mark.parametrize("name", ["hiermoe", "smartmoe_f1"])
def test_policy_decides_as_in_the_simulated_run_and_then_stays(name: str, case: Case, assessment: Assessment) -> None:
    own, steps = assessment.named(name), whole_run(case, assessment, name)
    before = steps[~steps["counted"]]
    assert assessment.num_seen == len(before) and assessment.num_held_out == ITERATIONS // 2
    old = placement = Placement.identity(case.sizes.num_experts)
    moved_ms = 0.0
    for moves in before["moves"].fillna(""):
        old, placement = placement, placement.after(moves)
        moved_ms += price_migration(
            old, placement, case.cluster, STATE_BYTES_PER_PARAMETER * case.sizes.expert_parameters
        ).link_ms
    assert not placement.is_identity
    schemes, last = own.candidate.schemes, own.updates.iloc[-1]
    expected = [
        ALLTOALLS_PER_STEP
        * choose_scheme(
            schemes, case.routing.counts(i, placement, case.cluster.hierarchy), case.cluster, case.sizes.sent
        ).alltoall_ms
        for i in range(ITERATIONS // 2, ITERATIONS)
    ]
    np.testing.assert_allclose(own.held_out.step_ms(case.cluster), expected, rtol=1e-12)
    assert last["step_ms"] == pytest.approx(np.mean(expected))
    assert last["moved_ms"] == own.moved_ms == pytest.approx(moved_ms)
    assert last["updates"] == (before["moved_experts"] > 0).sum()


def test_updates_start_from_fixed_experts_and_say_when_they_have_paid(assessment: Assessment) -> None:
    rows = assessment.named("hiermoe").updates
    fixed = assessment.named("hd_moe").held_out.step_ms(assessment.case.cluster).mean()
    assert rows["updates"].is_monotonic_increasing and rows["updates"].iloc[0] == 0
    assert rows["step_ms"].iloc[0] == pytest.approx(fixed)
    np.testing.assert_allclose(rows["value"], fixed / rows["step_ms"])
    last = rows.iloc[-1]
    assert last["value"] > 1
    assert last["break_even_steps"] == pytest.approx(last["moved_ms"] / (fixed - last["step_ms"]))
    assert 0 < last["step"] <= 16 and rows["step"].iloc[0] == 0


@pytest.mark.parametrize(
    ("moved", "saved", "steps"), [(10.0, 2.0, 5.0), (10.0, 0.0, np.inf), (10, -1, np.inf), (0, 0, 0)]
)
def test_break_even(moved: float, saved: float, steps: float) -> None:
    assert break_even_steps(moved, saved) == steps


def test_crossing_rows_are_counted_at_the_outermost_level_that_they_leave() -> None:
    hierarchy = Hierarchy((2, 4, 12))
    rows_SGG = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (3, 12, 12)))
    expected = [0, 0, 0]
    for stage, source, target in product(range(3), range(12), range(12)):
        for level in (1, 2, 3):
            if source // hierarchy.lanes(level) != target // hierarchy.lanes(level):
                expected[level - 1] += int(rows_SGG[stage, source, target])
                break
    assert crossing_rows(rows_SGG, hierarchy).tolist() == expected


def test_duplication_beside_what_chance_and_any_routing_would_give(assessment: Assessment) -> None:
    for _, level in assessment.levels.iterrows():
        assert level["lowest"] - 1e-12 <= level["independent"] <= level["highest"] + 1e-12
        assert level["lowest"] <= level["duplication"] <= level["highest"]
    outer = assessment.levels.iloc[0]
    sets = list(combinations(range(32), 4))  # E, K of the trace; two halves of 16
    distinct = np.mean([len({expert // 16 for expert in one}) for one in sets])
    assert outer["independent"] == pytest.approx(1 - distinct / 4)
    assert (outer["lowest"], outer["highest"]) == (0.5, 0.75)


def test_systems_that_no_count_tells_apart_stand_together(case: Case) -> None:
    found, left_out = candidates(case.cluster)
    labels = {one.name: one.labels for one in found}
    assert found[0].name == BASELINE and labels["megatron"] == ("Megatron-LM", "H1")
    assert set(labels["hd2"]) == {"HD2", "HD2-MoE", "Megatron-LM (flex)"}
    assert not {"megatron_reordered", "hiermoe_hidden"} & set(labels)
    pipelined = {"HD2, pipelined", "HD-MoE, pipelined", "HierMoE, pipelined"}
    copies = {label for label, reason in left_out if "in more than one place" in reason}
    assert copies >= {
        "EPLB (global)",
        "UltraEP",
        "LLEP",
        "FasterMoE",
        "ECHO",
        "ECHO (Sinkhorn)",
        "MoonEP",
        "LAER-MoE",
        "PlaceMoE",
        "HierMoE (copies)",
    }
    hidden = {"HierMoE, hidden moves", "HierMoE (search), hidden moves"}
    assert {label for label, _ in left_out} == {"H4", "HD4", *hidden, *pipelined, *copies}
    assert all("how far its stages overlap" in reason for label, reason in left_out if label in pipelined)
    assert {one.name for one in found if one.moves} >= {"hiermoe", "smartmoe", "hd2_moe_smart"}
    assert [one.name for one in found if one.lossy] == ["tutel_2dh_padded_cf1"]


def test_pipelined_systems_are_priced_where_it_is_known_how_far_stages_overlap(case: Case) -> None:
    ms = {}
    wide = replace(case, sizes=replace(case.sizes, hidden_size=2**20))  # rows that are worth cutting
    for overlap in (0.0, 0.5, 1.0):
        known = replace(wide, cluster=case.cluster.model_copy(update={"overlap": overlap}))
        found = assess(known, candidates(known.cluster, ["hd2", "hd2_pipelined"])[0])
        plain, chunked = (found.named(name).held_out for name in ("hd2", "hd2_pipelined"))
        ms[overlap] = chunked.step_ms(known.cluster).sum()
        if not overlap:
            assert ms[overlap] == plain.step_ms(known.cluster).sum()  # one chunk is the cheapest
        assert sum(chunked.mean_stages(known.cluster).values()) == pytest.approx(chunked.step_ms(known.cluster).mean())
    assert ms[1.0] < ms[0.5] < ms[0.0]


def test_other_assumptions_price_what_a_new_assessment_would(case: Case, assessment: Assessment) -> None:
    base = recommend([option(x, case.cluster) for x in assessment.systems], "published", None)
    base = replace(base, outcome="dispatch", chosen="hd2")
    table = sensitivity(assessment, base).set_index("assumption")
    for one in assumptions(case.cluster, case.tokens_per_rank):
        if one.share_of_bytes != 1:
            continue
        systems, _ = candidates(case.cluster, ["hd2"])
        anew = assess(replace(case, cluster=one.cluster), systems)
        assert table.loc[one.words, "value"] == pytest.approx(anew.named("hd2").speedup.value)
    assert table["value"].nunique() == len(table)


@pytest.mark.parametrize("name", ["a6000_1x8", "cloud_eth100"])  # published constants, and derived ones
def test_assumptions_change_what_they_say(name: str) -> None:
    cluster = scaled(Cluster.named(name), 8 if name == "a6000_1x8" else 32)
    cluster = cluster.model_copy(update={"wave_ms": 3.0})
    given, slow, fast, inside, start, flat, fewer = assumptions(cluster, 64)
    world, inter1, intra1, inter2, intra2 = cluster.exchanges

    def ratio(one, peers, field="beta_ms_per_byte") -> float:
        return getattr(one.cluster.constants(peers), field) / getattr(given.cluster.constants(peers), field)

    assert [ratio(slow, p) for p in (world, inter1, intra1, inter2, intra2)] == pytest.approx([2, 2, 1, 1, 1])
    assert [ratio(fast, p) for p in (world, inter1, intra1)] == pytest.approx([0.5, 0.5, 1])
    assert [ratio(inside, p) for p in (world, inter1, intra1, inter2, intra2)] == pytest.approx([1, 1, 2, 2, 2])
    assert [ratio(start, p, "alpha_ms") for p in (world, inter1, intra2)] == pytest.approx([2, 2, 2])
    waves = [one.cluster.wave_ms for one in (given, slow, fast, inside, start, flat)]
    assert waves == [3.0, 3.0, 3.0, 3.0, 6.0, 3.0]
    assert [ratio(flat, p) for p in (world, inter1)] == pytest.approx([0.8, 1])
    assert fewer.share_of_bytes == 1 / 8 and fewer.words == "8 tokens a GPU, not 64"


def test_fabric_that_others_published_of_is_tried_with_their_times() -> None:
    cluster = scaled(Cluster.named("h200_efa400"), 16)
    held = published_times(cluster)
    assert held is not None and held.rows == 6 and 1 < held.low < held.high
    (given, *_), (found,) = (
        [one for one in assumptions(cluster, 64) if one.words.startswith(start)] for start in ("as given", "other disp")
    )
    betas = [one.cluster.constants(cluster.exchanges[0]).beta_ms_per_byte for one in (given, found)]
    assert betas[0] / betas[1] == pytest.approx(held.high)
    assert published_times(Cluster.named("a6000_4x8")) is None


def test_tokens_needed_is_the_first_power_of_two_that_pays(assessment: Assessment) -> None:
    case = assessment.case

    def gain(tokens: int) -> float:
        part = tokens / case.tokens_per_rank
        ours, flat = (assessment.named(x).held_out.step_ms(case.cluster, part).sum() for x in ("hd2", "megatron"))
        return 1 - ours / flat

    paying = [tokens for tokens in (16, 32, 64) if gain(tokens) >= STAY_BELOW_GAIN]
    assert tokens_needed(assessment, "hd2") == (paying[0] if paying else None)
    assert tokens_needed(assessment, "megatron") is None


def test_what_people_know_stands_for_its_own_equals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "system").mkdir()
    own = yaml.safe_load((CONF / "system" / "hd2.yaml").read_text()) | {"name": "a_copy", "label": "A copy"}
    (tmp_path / "system" / "a_copy.yaml").write_text(yaml.safe_dump(own))
    monkeypatch.setattr("hiermoe.records.groups.OWN", tmp_path)
    (found,) = [one for one in candidates(Cluster.named("a6000_4x8"))[0] if "A copy" in one.labels]
    assert found.name == "hd2" and found.label == "HD2"
