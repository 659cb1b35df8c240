"""Measured runs beside their predictions: medians of the busiest rank, speed-ups over stock, no mixed column."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hiermoe.analysis.figures.measured.dispatchers import FIGURE
from hiermoe.analysis.frames import Results, load, step_times
from hiermoe.analysis.report import write_report
from hiermoe.ranks.places import RanksConfig
from hiermoe.records.index import PREDICTIONS
from hiermoe.runs.compose import Cell
from hiermoe.runs.indexing import indexed
from tests.analysis.conftest import ITERATIONS, MemoryStore, cell, records_of, step_ms, write

EMULATED: dict[str, Any] = {"measure": "replay", "ranks": RanksConfig(name="emulated", timeout_s=60)}
SYSTEMS = ("megatron", "hd2_moe", "hiermoe")
LINK_MS = {"1:world": 18.0, "1:inter1": 8.0, "2:intra1": 4.0}  # of one dispatch; alpha is 0


def measured_rows(config: Any, slower: float) -> pd.DataFrame:
    """Two of the ranks, the second of them always the busiest; times are the predicted ones made slower."""
    rows: list[dict[str, Any]] = []
    stages = ("1:world",) if config.system.name == "megatron" else ("1:inter1", "2:intra1")
    for iteration in range(ITERATIONS):
        for rank, factor in ((0, 0.5), (1, 1.0)):
            keys = {
                "iteration": iteration, "routing_iteration": iteration, "counted": iteration >= ITERATIONS // 2,
                "layer": 0, "rank": rank,
            }  # fmt: skip
            wire_ms = factor * slower * step_ms(config.system.name) * (1 + 0.01 * iteration)
            rows += [
                keys | {"phase": "dispatch", "stage": stage, "wire_ms": wire_ms / 4 / len(stages), "bytes": 10.0,
                        "alone_ms": factor * LINK_MS[stage] * (1.2 if stage == "2:intra1" else 1.1)}
                for stage in stages
            ]  # fmt: skip
            rows.append(
                keys | {
                    "phase": "step", "stage": "all", "wire_ms": wire_ms, "dispatch_ms": wire_ms + 10.0,
                    "local_ms": 10.0, "num_wrong": 0, "planning_ms": 3.0, "migration_ms": 20.0,
                    "copies_ms": factor * 7.0, "gradient_ms": factor * 4.0, "net_ms": wire_ms + 10.0 + factor * 11.0,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Three systems, simulated, and measured 1.5 times as slow on the wire."""
    store = MemoryStore(tmp_path_factory.mktemp("runs"))
    predicted, measured = [], []
    other = cell({"system": "megatron", "cluster": "emulated_4x8", "routing": "uniform"}).config.model_copy(
        update=EMULATED | {"narrowed": 2}
    )
    write(store, other, measured_rows(other, 9.0))
    measured.append(Cell((), other))  # a baseline on rows of another width, without a prediction
    for system in SYSTEMS:
        twin = cell({"system": system, "cluster": "emulated_4x8", "routing": "uniform"})
        config = twin.config.model_copy(update=EMULATED)
        rows = records_of(twin.config)
        link_ms = rows["stage"].map(LINK_MS).where(rows["phase"] == "dispatch").astype(float)
        write(store, twin.config, rows.assign(link_ms=link_ms))
        write(store, config, measured_rows(config, 1.5))
        predicted.append(twin)
        measured.append(Cell(twin.overrides, config))
    return load(indexed({"fig11": [*predicted, *measured], PREDICTIONS: predicted}), store)


@pytest.fixture(scope="module")
def table(results: Results) -> pd.DataFrame:
    return FIGURE.table(results, [])


def test_steps_of_measured_runs_are_those_of_the_busiest_rank_whether_or_not_there_are_simulated_ones_beside() -> None:
    keys = {"iteration": [0, 0, 1, 1], "counted": True, "predicted_ms": float("nan")}
    measured = pd.DataFrame(keys | {"run_id": "m", "source": "emulated", "dispatch_ms": [1.0, 2.0, 4.0, 3.0]})
    simulated = pd.DataFrame(
        {"iteration": [0, 1], "counted": True, "predicted_ms": [5.0, 6.0], "run_id": "s", "source": "simulated"}
    )
    assert step_times(measured)["step_ms"].tolist() == [2.0, 4.0]
    assert step_times(simulated)["step_ms"].tolist() == [5.0, 6.0]
    both = step_times(pd.concat([measured, simulated], ignore_index=True)).set_index("run_id")["step_ms"]
    assert (both["m"].tolist(), both["s"].tolist()) == ([2.0, 4.0], [5.0, 6.0])


def test_every_measured_run_has_one_row_beside_its_own_prediction(table: pd.DataFrame) -> None:
    assert table["system"].tolist() == list(SYSTEMS) and set(table["source"]) == {"emulated"}
    assert table["wire_over_predicted"].tolist() == pytest.approx([1.5 * 1.055] * 3, rel=0.03)
    assert table["predicted_ms"].tolist() == pytest.approx([step_ms(system) for system in SYSTEMS], rel=0.03)


def test_times_are_medians_of_the_busiest_rank(table: pd.DataFrame) -> None:
    (row,) = table[table["system"] == "hiermoe"].to_dict("records")
    assert row["wire_ms"] == pytest.approx(1.5 * 40 * 1.055)
    assert row["value"] == pytest.approx(1.5 * 40 * 1.055 + 10)
    assert row["low"] <= row["value"] <= row["high"]
    assert row["n"] == ITERATIONS // 2


def test_what_copies_take_stands_beside_the_alltoalls(table: pd.DataFrame) -> None:
    (row,) = table[table["system"] == "hiermoe"].to_dict("records")
    assert (row["copies_ms"], row["gradient_ms"]) == (7, 4)
    assert row["net_ms"] == pytest.approx(row["value"] + 11, rel=1e-3)
    assert FIGURE.words(table).rows[0][-5:-1] == (
        "weights to copies ms", "gradients home ms", "net ms", "net predicted ms",
    )  # fmt: skip


def test_speedups_on_the_wire_and_of_whole_calls_are_told_apart(table: pd.DataFrame) -> None:
    (row,) = table[table["system"] == "hiermoe"].to_dict("records")
    assert row["wire_speedup"] == pytest.approx(80 / 40)
    assert row["whole_speedup"] == pytest.approx((1.5 * 80 * 1.055 + 10) / (1.5 * 40 * 1.055 + 10))
    assert row["predicted_speedup"] == pytest.approx(80 / 40, rel=0.02)


def test_links_have_their_own_prediction_and_stages_are_compared_with_them(table: pd.DataFrame) -> None:
    stock, *hierarchical = table.to_dict("records")
    for row in hierarchical:
        assert row["links_speedup"] == pytest.approx(18 / (8 + 4))
        assert (row["alone_low"], row["alone_high"]) == (pytest.approx(1.1), pytest.approx(1.2))
        assert row["stages"].startswith("1:inter1 1.10, ") and "2:intra1 1.20, " in row["stages"]
    assert stock["links_speedup"] == 1 and stock["link_ms"] == 4 * 18


def test_chunks_pass_their_links_at_a_time(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    settings = {"cluster": "emulated_4x8", "cluster.overlap": 0.5, "routing": "uniform"}
    twins = [cell(settings | {"system": system}) for system in ("megatron", "hd_pipelined")]
    measured = [Cell(twin.overrides, twin.config.model_copy(update=EMULATED)) for twin in twins]
    for twin, own in zip(twins, measured, strict=True):
        rows = records_of(twin.config)
        rows["link_ms"] = rows["stage"].map(LINK_MS).where(rows["phase"] == "dispatch").astype(float)
        write(store, twin.config, rows.assign(chunks=4.0 if own.config.system.name == "hd_pipelined" else 1.0))
        write(store, own.config, measured_rows(own.config, 1.0))
    stock, cut = FIGURE.table(load(indexed({"fig11": measured, PREDICTIONS: twins}), store), []).to_dict("records")
    assert (stock["link_ms"], cut["link_ms"]) == (4 * 18, 4 * (8 + 4 / 4))  # at best one of four chunks is waited for
    assert cut["links_speedup"] == pytest.approx(18 / (8 + 4 - 4 * 0.5 * 3 / 4))


def test_words_and_drawing_come_from_the_table(table: pd.DataFrame) -> None:
    words = FIGURE.words(table)
    header, *rows = words.rows
    assert len(rows) == 3 and {len(row) for row in rows} == {len(header)}
    near = "within 15 % of those by the links for {} of 2 runs{}, and within 15 % of the predicted ones for 2."
    exact = table.assign(links_speedup=table["wire_speedup"])
    assert near.format(2, "") in " ".join(FIGURE.words(exact).text)
    exact.loc[exact["system"] == "hiermoe", "links_speedup"] *= 1.2
    assert near.format(1, " (not for HierMoE on uniform routing)") in " ".join(FIGURE.words(exact).text)
    assert "take 1.10 to 1.20 times α and what the busiest shaped link needs" in " ".join(words.text)
    assert "differ from their known answer: 0" in " ".join(words.text)
    assert FIGURE.draw(table, words.title).axes


def test_clusters_have_panels_of_their_own_and_the_largest_the_title(table: pd.DataFrame) -> None:
    small = table.assign(cluster="small", num_ranks=8, whole_speedup=9.0)
    both = pd.concat([table, small], ignore_index=True)
    words = FIGURE.words(both)
    assert words.title == FIGURE.words(table).title and "9.00" not in words.title
    assert words.caption.startswith("32 or 8 gloo ranks.")
    named = [row[0] for row in words.rows[1:]]
    assert (
        named
        == ["Qwen3-30B-A3B (paper's, 32 layers), K=8, 32 ranks"] * 3
        + ["Qwen3-30B-A3B (paper's, 32 layers), K=8, 8 ranks"] * 3
    )
    panels = [panel for panel in FIGURE.draw(both, words.title).axes if panel.get_visible()]
    assert [len(panel.get_yticklabels()) for panel in panels] == [3, 3]


def test_a_run_without_its_prediction_is_left_out(results: Results) -> None:
    alone = Results({**results.runs, PREDICTIONS: []}, results.records, results.store)
    assert FIGURE.table(alone, []).empty


def test_report_judges_measured_runs_apart_from_predicted_ones(
    results: Results, cells: dict[str, list[Cell]], tmp_path: Path
) -> None:
    measured = [
        Cell((), run.config) for run in results.runs["fig11"] if run.source == "emulated" and run.config.narrowed == 1
    ]
    twins = [Cell((), run.config) for run in results.runs[PREDICTIONS]]
    index = indexed(cells | {"fig11": [*cells["fig11"], *measured], PREDICTIONS: twins})
    report = write_report(index, results.store, tmp_path)
    page, verdicts = report.page, report.verdicts
    judged = verdicts[verdicts["source"] == "emulated"].set_index("claim")
    whole_calls = (1.5 * 80 * 1.055 + 10) / (1.5 * 40 * 1.055 + 10)
    assert judged.loc["F11-hiermoe-qwen3", "ours"] == pytest.approx(whole_calls)
    assert judged.loc["A-e2e", "verdict"] == "not testable" and "no compute time" in str(judged.loc["A-e2e", "reason"])
    assert (tmp_path / "figures" / "measured_emulated.png").exists()
    text = page.with_suffix(".md").read_text()
    assert (
        f"Measured on an emulated cluster: {whole_calls:.2f} times as fast, 1.99 published, for Qwen3-30B-A3B (paper"
        in text.splitlines()[2]
    )
    assert "| emulated, uniform |" in text and "| claim | published |" in text
