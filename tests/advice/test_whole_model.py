"""A whole model's answer: its layers add up, those where moving does not pay stay, and another trace may judge."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hiermoe.advice import phrases
from hiermoe.advice.answer_tables import Answer
from hiermoe.advice.assessment import Assessment, assess
from hiermoe.advice.case import Question
from hiermoe.advice.inputs import resolve
from hiermoe.advice.page import write_page
from hiermoe.advice.systems import candidates
from hiermoe.advice.whole_model import assess_layers, pays, summed
from tests.advice.conftest import ITERATIONS, config_of, tiny_trace

LAYERS = 3
SYSTEMS = ("hd2", "hd_moe", "hiermoe", "smartmoe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces")
    tiny_trace(iterations=16, layers=LAYERS).save(path / "a.trace")
    tiny_trace(iterations=8, layers=LAYERS).save(path / "b.trace")
    tiny_trace(iterations=8, layers=2).save(path / "two.trace")
    return path


@pytest.fixture(scope="module")
def question(folder: Path) -> Question:
    return resolve(config_of(trace=str(folder / "a.trace"), layer=None))


@pytest.fixture(scope="module")
def layers(question: Question) -> list[Assessment]:
    systems, left_out = candidates(question.cases[0].cluster, SYSTEMS)
    return [assess(case, systems, left_out) for case in question.cases]


@pytest.fixture(scope="module")
def whole(question: Question, layers: list[Assessment]) -> Assessment:
    return summed(question, layers)


def test_every_layer_is_a_case_and_one_may_be_asked_for_alone(question: Question, folder: Path) -> None:
    assert [case.layer for case in question.cases] == [1, 2, 3]
    assert question.words == "recorded routing of tiny, 3 layers"
    alone = resolve(config_of(trace=str(folder / "a.trace"), layer=1))
    assert [case.layer for case in alone.cases] == [2]
    step, same = alone.cases[0].routing.step(3), question.cases[1].routing.step(3)
    assert np.array_equal(step.expert_ids_NK.numpy(), same.expert_ids_NK.numpy())


@pytest.mark.parametrize("name", ["megatron", "hd2", "hd_moe"])
def test_times_of_layers_add_up(name: str, whole: Assessment, layers: list[Assessment]) -> None:
    cluster = whole.case.cluster
    parts = [layer.named(name).held_out.step_ms(cluster) for layer in layers]
    np.testing.assert_allclose(whole.named(name).held_out.step_ms(cluster), np.sum(parts, axis=0))
    stages = whole.named(name).held_out.mean_stages(cluster)
    assert sum(stages.values()) == pytest.approx(np.sum(parts, axis=0).mean())
    crossing = sum(layer.named(name).held_out.crossing(cluster) for layer in layers)
    np.testing.assert_allclose(whole.named(name).held_out.crossing(cluster), crossing)


def test_layers_where_moving_does_not_pay_keep_their_experts(whole: Assessment, layers: list[Assessment]) -> None:
    cluster, own = whole.case.cluster, whole.named("hiermoe")
    moved = [pays(layer.named("hiermoe"), layer) for layer in layers]
    parts = [
        (part.held_out if x else part.fixed).step_ms(cluster)
        for part, x in zip([layer.named("hiermoe") for layer in layers], moved, strict=True)
    ]
    np.testing.assert_allclose(own.held_out.step_ms(cluster), np.sum(parts, axis=0))
    for layer, x in zip(layers, moved, strict=True):
        assert own.placements[layer.case.layer].is_identity != x
    paid = [layer.named("hiermoe").moved_ms for layer, x in zip(layers, moved, strict=True) if x]
    assert own.moved_ms == pytest.approx(sum(paid)) and any(moved)


def test_a_layer_that_costs_too_much_to_move_is_left_out(question: Question, layers: list[Assessment]) -> None:
    (dear, *others) = layers
    systems = list(dear.systems)
    position = next(i for i, one in enumerate(systems) if one.candidate.name == "hiermoe")
    updates = systems[position].updates.assign(moved_ms=1e9)
    systems[position] = replace(systems[position], updates=updates)
    found = summed(question, [replace(dear, systems=tuple(systems)), *others])
    assert found.named("hiermoe").placements[1].is_identity
    table = Answer.of(found).layers
    assert table["layer"].tolist() == [1, 2, 3]


def test_no_experts_move_in_a_layer_where_they_stay(question: Question, layers: list[Assessment]) -> None:
    first = layers[0]
    own = first.named("hiermoe")
    stays = replace(own, held_out=own.fixed, updates=own.updates.assign(moved_ms=0.0, moved_experts=0))
    systems = tuple(stays if one is own else one for one in first.systems)
    table = Answer.of(summed(question, [replace(first, systems=systems), *layers[1:]])).layers
    assert not table["moves"].iloc[0] and table["moved_experts"].iloc[0] == 0


def test_processes_find_what_one_finds(question: Question, whole: Assessment) -> None:
    seen: list[int] = []
    again = assess_layers(question, *candidates(question.cases[0].cluster, SYSTEMS), seen.append, workers=2)
    assert seen == [1, 2, 3]
    for one, other in zip(again.systems, whole.systems, strict=True):
        assert one.speedup == other.speedup
        assert {n: x.key for n, x in one.placements.items()} == {n: x.key for n, x in other.placements.items()}


def test_the_page_has_the_layers_and_the_placements_as_files(
    whole: Assessment, question: Question, tmp_path: Path
) -> None:
    answer = Answer.of(whole)
    page = write_page(answer, tmp_path, question)
    text = page.with_suffix(".md").read_text()
    assert "## Layer by layer" in text and (tmp_path / "figures" / "layers.png").is_file()
    assert "All 3 MoE layers" in text and "| nan" not in text
    assert len(answer.layers) == LAYERS
    assert answer.layers["flat_ms"].sum() == pytest.approx(answer.flat_ms)
    if answer.found.outcome == "placement":
        rows = json.loads((tmp_path / "placement.json").read_text())["physical_to_logical_map"]
        assert [rows[layer - 1] for layer in (1, 2, 3)] == [
            answer.own.placements[layer].expert_at_S.tolist() for layer in (1, 2, 3)
        ]
    else:
        assert not (tmp_path / "placement.json").exists()


def test_an_answer_says_what_it_does_with_moves_and_why_it_has_no_files(
    whole: Assessment, question: Question, tmp_path: Path
) -> None:
    answer = Answer.of(whole)
    moved = replace(answer, found=replace(answer.found, outcome="placement", chosen="hiermoe"))
    assert phrases.why_no_files(moved) == "" and "moving experts pays in" in phrases.title_of_layers(moved)
    still = replace(answer, found=replace(answer.found, outcome="dispatch", chosen="hd2"))
    assert "moving experts would pay in" in phrases.title_of_layers(still)
    assert "too little in all to recommend it" in phrases.title_of_layers(still)
    own = moved.assessment.named("hiermoe")
    nameless = replace(own, placements={layer - 1: where for layer, where in own.placements.items()})
    systems = [nameless if one is own else one for one in whole.systems]
    nobody_says = replace(moved, assessment=replace(whole, systems=tuple(systems)))
    (told,) = [line for line in phrases.conditions(nobody_says) if line.startswith("No placement files")]
    assert "--first-layer 1" in told
    write_page(nobody_says, tmp_path, question)
    assert not (tmp_path / "placement.json").exists() and told in (tmp_path / "advice.md").read_text()


def test_another_trace_judges(folder: Path) -> None:
    paths = {name: str(folder / f"{name}.trace") for name in ("a", "b")}
    question = resolve(config_of(trace=(paths["a"], paths["b"]), judged_on=paths["b"], layer=0))
    (case,) = question.cases
    seen, held_out = case.schedules
    assert case.source.num_distinct == 24 and len(seen) == ITERATIONS and set(seen) == set(range(24))
    assert held_out == list(range(8))
    found = assess(case, *candidates(case.cluster, SYSTEMS))
    assert found.num_held_out == 8 and found.num_seen == ITERATIONS
    alone = resolve(config_of(trace=paths["b"], layer=0)).cases[0]
    flat_ms = [alone.routing.counts(i, case.first_places, case.cluster.hierarchy).pairs_GS.sum() for i in range(8)]
    assert [
        case.judging.counts(i, case.first_places, case.cluster.hierarchy).pairs_GS.sum() for i in range(8)
    ] == flat_ms
    assert any("judged on b.trace" in note for note in case.notes)
    assert math.isfinite(found.named("hiermoe").speedup.value)


def test_traces_that_do_not_fit_together_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"go together: layers=\[1, 2, 3\] in one, \[1, 2\] in"):
        resolve(config_of(trace=str(folder / "a.trace"), judged_on=str(folder / "two.trace")))
    with pytest.raises(ValueError, match="judged_on= is a trace"):
        config_of(loads="loads.csv", judged_on="a.trace")
