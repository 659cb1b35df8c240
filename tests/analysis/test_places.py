"""Verdicts over layers of real models, and the figure of what routing leaves to placement."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hiermoe.analysis.cases import Case
from hiermoe.analysis.claims import load_claims, load_rules
from hiermoe.analysis.figures.beyond import structure
from hiermoe.analysis.frames import Results, load
from hiermoe.analysis.statistics import Estimate
from hiermoe.analysis.verdicts import Judged, Verdict, judge_all, over_places, to_frame, verdict_summary
from hiermoe.ranks.places import RanksConfig
from hiermoe.records.index import REAL_MODELS, RECORDED, over
from hiermoe.runs.compose import Cell, expand
from hiermoe.runs.indexing import indexed
from hiermoe.runs.routings import JUDGED
from hiermoe.topology.cluster import Cluster
from tests.analysis.conftest import MemoryStore, cell, records_of, write

CLAIMS, RULES = load_claims(), load_rules()
LAYERS = (0, 7, 25)
NOTHING = Estimate(float("nan"), float("nan"), float("nan"), 0)


def judged(verdict: Verdict, value: float, layer: int) -> Judged:
    claim = next(claim for claim in CLAIMS if claim.claim == "F11-hiermoe-qwen3")
    case = Case(claim, "fig11", "simulated", "public", "deepseek_v2_lite", "megatron", "", f"MoE layer {layer}", (), ())
    return Judged(claim, case, Estimate(value, value - 0.1, value + 0.1, 32), verdict, "")


@pytest.mark.parametrize(
    ("verdicts", "reached"),
    [
        ("rrr", "reproduced"),
        ("rrs", "reproduced"),
        ("rss", "same direction"),
        ("rsc", "same direction"),
        ("rcc", "contradicted"),
        ("rs", "reproduced"),  # half of two is one
        ("rccc", "contradicted"),
        ("rrcc", "reproduced"),
    ],
)
def test_verdict_is_the_best_that_half_of_the_places_reach(verdicts: str, reached: str) -> None:
    full: dict[str, Verdict] = {"r": "reproduced", "s": "same direction", "c": "contradicted"}
    members = [judged(full[letter], 2.0 - 0.1 * at, at + 1) for at, letter in enumerate(verdicts)]
    for order in (members, members[::-1]):
        one = over_places(order)
        assert one.verdict == reached
        assert one.estimate.low == pytest.approx(2.1 - 0.1 * len(verdicts)) and one.estimate.high == 2.0
        assert one.estimate.value == pytest.approx(2.05 - 0.05 * len(verdicts)) and one.estimate.n == len(verdicts)
        assert f"least in MoE layer {len(verdicts)}, most in MoE layer 1" in one.reason


def test_places_without_a_number_are_counted_and_nothing_else() -> None:
    lacking = replace(judged("not testable", 1.0, 3), estimate=NOTHING)
    one = over_places([lacking, judged("reproduced", 2.0, 1), judged("same direction", 1.5, 2)])
    assert one.verdict == "reproduced" and one.estimate.n == 2 and "no number in 1 more" in one.reason
    assert over_places([lacking, lacking]).verdict == "not testable"


def slower_by_layer(cells: dict[str, list[Cell]], store: MemoryStore) -> Results:
    """Made-up records of these runs; HierMoE takes a little longer in every further layer."""
    for one in {one.config.run_id: one.config for sweep in cells.values() for one in sweep}.values():
        rows = records_of(one)
        if one.system.name == "hiermoe":
            rows["predicted_ms"] *= 1 + 0.01 * one.routing.source["layer"]
        write(store, one, rows)
    return load(indexed(cells), store)


@pytest.fixture(scope="module")
def on_real_models(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Made-up records of two sweeps on some layers, each layer a little faster than the one before."""
    store = MemoryStore(tmp_path_factory.mktemp("places"))
    cells: dict[str, list[Cell]] = {}
    for sweep, systems in (
        ("fig11", ("megatron", "hd_moe", "hiermoe")),
        ("structure", ("hd_moe", "hiermoe", "hiermoe_search")),
    ):
        cells[over(sweep, REAL_MODELS)] = [
            cell({"model": "deepseek_v2_lite", "routing": "public", "routing.source.layer": layer, "system": system})
            for layer in LAYERS
            for system in systems
        ]
    return slower_by_layer(cells, store)


def test_each_claim_has_one_row_on_real_models_whatever_its_model(on_real_models: Results) -> None:
    found = [one for one in judge_all(CLAIMS, RULES, on_real_models) if one.routing == "public"]
    by_claim = {one.claim.claim: one for one in found if one.claim.claim.startswith("F11-hiermoe-")}
    for name in ("F11-hiermoe-qwen3", "F11-hiermoe-dsv3"):
        one = by_claim[name]
        assert one.estimate.n == len(LAYERS) and one.case and one.case.model == "deepseek_v2_lite"
        assert one.estimate.high == pytest.approx(2.0, rel=0.02) and one.estimate.low == pytest.approx(1.6, rel=0.02)
        assert one.estimate.value == pytest.approx(2 / 1.07, rel=0.02)
        assert "median of 3 places" in one.reason and "most in deepseek_v2_lite_law, MoE layer 1" in one.reason
    assert not [one for one in found if one.claim.where == "Table IV"]
    with io.StringIO() as text:
        Console(file=text, width=80).print(verdict_summary(to_frame(found)))
        assert "real models" in text.getvalue()


def test_figure_says_how_many_layers_reach_the_published_gain(on_real_models: Results) -> None:
    table = structure.FIGURE.table(on_real_models, CLAIMS)
    assert len(table) == len(LAYERS) and set(table["routing"]) == {"public"}
    assert table["value"].tolist() == pytest.approx([46 / 40, 46 / 42.8, 46 / 50], rel=0.02)
    assert table["searched"].tolist() == pytest.approx([46 / 40] * 3, rel=0.02)
    words = structure.FIGURE.words(table)
    assert "2 of 3 reach the smaller published gain" in words.text[0] and "published 1.07 and 1.16" in words.title
    assert structure.FIGURE.draw(table, words.title).axes[0].get_lines()


def test_recorded_places_are_judged_with_the_run_of_the_sweep_and_that_one_is_counted_once(
    tmp_path: Path,
) -> None:
    store, systems = MemoryStore(tmp_path), ("megatron", "hiermoe")
    places = [(layer, stage) for stage in ("early", "late") for layer in range(3)]
    recorded = {"model": "qwen3_30b_a3b_paper", "routing": "recorded"}
    # Measured beside it on another cluster, which the row of simulated runs need not tell apart from its own.
    cells = {"fig11": [cell({**recorded, "system": system}) for system in systems]}
    emulated = {"measure": "replay", "ranks": RanksConfig.named("emulated"), "cluster": Cluster.named("emulated_4x8")}
    cells["fig11"] += [Cell(one.overrides, one.config.model_copy(update=emulated)) for one in cells["fig11"]]
    cells[over("fig11", RECORDED)] = [
        cell({**recorded, "routing.source.layer": layer, "routing.source.stage": stage, "system": system})
        for layer, stage in places
        for system in systems
    ]
    found = judge_all(CLAIMS, RULES, slower_by_layer(cells, store))
    ours, beside = (one for one in found if one.claim.claim == "F11-hiermoe-qwen3")
    assert beside.case is not None and beside.case.source == "emulated"
    assert ours.routing == "recorded" and ours.estimate.n == len(places)
    assert "least in late, MoE layer 3" in ours.reason or "least in early, MoE layer 3" in ours.reason


def test_sweeps_over_real_models_are_those_of_the_paper_on_its_layers() -> None:
    for sweep in JUDGED:
        base, here = expand(sweep), expand(sweep, REAL_MODELS)
        assert {x.config.system.name for x in here} == {x.config.system.name for x in base}
        assert {x.config.routing.name for x in here} == {"public"}
        assert {x.config.routing.source["layer"] for x in here} == set(range(26))
