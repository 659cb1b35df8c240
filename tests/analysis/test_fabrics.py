"""Figures beyond the paper: which run is compared with which, what is called best, and what the words say."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from hiermoe.analysis.figures.beyond import heat_map, planner_cost
from hiermoe.analysis.figures.beyond import world_sizes as scaling
from hiermoe.analysis.figures.beyond.fabrics import alpha_share
from hiermoe.analysis.frames import Results, load
from hiermoe.analysis.report import write_report
from hiermoe.records.store import RunStore
from hiermoe.runs.compose import Cell, expand
from hiermoe.runs.indexing import index_runs, indexed
from hiermoe.topology.data_sheet import CAVEAT
from hiermoe.topology.peers import Peers
from tests.analysis.conftest import not_run, records_of, write


@pytest.fixture
def beyond(cells: dict[str, list[Cell]]) -> dict[str, list[Cell]]:
    return {name: cells[name] for name in ("scaling", "heat_map", "planner_cost")}


def fill(store: RunStore, cells: Sequence[Cell], factor=lambda config: 1.0, dimension=lambda config: 2) -> None:
    """Made-up records whose time and dimension depend on the run."""
    for config in {cell.config.run_id: cell.config for cell in cells}.values():
        rows = records_of(config)
        rows["predicted_ms"] *= factor(config)
        rows.loc[rows["phase"] == "step", "dimension"] = dimension(config)
        write(store, config, rows)


def test_scaling_compares_with_the_flat_alltoall_of_the_same_world(
    beyond: dict[str, list[Cell]], small_store: RunStore
) -> None:
    """The flat one takes longer the larger the world; a baseline of another world would show."""
    fill(small_store, beyond["scaling"], lambda c: c.world_size if c.system.name == "megatron" else 1.0)
    table = scaling.FIGURE.table(load(indexed(beyond), small_store), [])
    flat = table[table["system"] == "megatron"]
    assert (flat["value"] == 1).all() and len(flat) == 6
    for _, row in table[table["system"] == "hiermoe"].iterrows():
        assert row["value"] == pytest.approx(80 / 40 * row["world_size"], rel=0.05)
    assert table["from_data_sheets"].all() and set(table["fabric"]) == {"h100_ib400", "gb200_nvl72_ib400"}


@pytest.mark.slow
def test_scaling_leaves_out_worlds_that_lack_a_system(beyond: dict[str, list[Cell]], small_store: RunStore) -> None:
    fill(small_store, [c for c in beyond["scaling"] if not (c.config.world_size == 64 and "hier" in c.overrides[-1])])
    table = scaling.FIGURE.table(load(indexed(beyond), small_store), [])
    assert sorted(set(table["world_size"])) == [8, 256]


@pytest.mark.slow
def test_scaling_takes_in_large_worlds_when_there_are_records(
    beyond: dict[str, list[Cell]], small_store: RunStore
) -> None:
    fill(small_store, beyond["scaling"])
    assert len(index_runs(small_store, beyond)["scaling"]) == len(beyond["scaling"])
    alone = scaling.FIGURE.words(scaling.FIGURE.table(load(indexed(beyond), small_store), []))
    assert f"`{scaling.LARGE}`" in alone.text[-1] and CAVEAT in alone.caption
    large = [cell for cell in expand("large/scaling") if cell.config.cluster.name.startswith("h100")]
    fill(small_store, large, lambda c: 1.5 if c.world_size == 4096 else 1.0)
    both = index_runs(small_store, beyond)
    assert len(both["scaling"]) == len(beyond["scaling"]) + len(large)
    words = scaling.FIGURE.words(scaling.FIGURE.table(load(both, small_store), []))
    assert words.title.startswith("From 8 to 4096 GPUs")
    assert "16 of them at 4096 GPUs" in words.text[-1] and "HierMoE +50 %" in words.text[-1]


@pytest.mark.slow
def test_scaling_says_where_deduplication_begins_to_pay(beyond: dict[str, list[Cell]], small_store: RunStore) -> None:
    fill(
        small_store,
        beyond["scaling"],
        lambda c: 80 / 46 if c.system.name == "hd_moe" and c.world_size < 64 else 1.0,
        lambda c: 1 if c.world_size < 64 else 2,
    )
    text = scaling.FIGURE.words(scaling.FIGURE.table(load(indexed(beyond), small_store), [])).text[0]
    assert "first exceeds 1.1× at 64 GPUs" in text
    assert "d* is above 1 from 64 GPUs on (split at: node)" in text


def test_heat_map_takes_the_fastest_system_of_each_cell(beyond: dict[str, list[Cell]], small_store: RunStore) -> None:
    """On H800 nothing beats the flat AlltoAll; elsewhere HierMoE is the fastest of the made-up systems."""
    fill(
        small_store,
        [c for c in beyond["heat_map"] if c.config.routing.name == "uniform"],
        lambda c: 0.1 if c.system.name == "megatron" and c.cluster.name.startswith("h800") else 1.0,
    )
    results = load(indexed(beyond), small_store)
    table = heat_map.FIGURE.table(results, [])
    assert len(table) == 2 * 2
    best = table.groupby("fabric")["system"].unique()
    assert best.pop("h800_ib400").tolist() == ["megatron"]
    assert all(systems.tolist() == ["hiermoe"] for systems in best)
    words = heat_map.FIGURE.words(table)
    assert words.title.startswith("Of 4 pairs of a fabric and a routing, 2 gain at least 5 %")
    assert any("may as well stay: 8×H800, 400 Gb/s a GPU: DeepSeek-V3, Mixtral-8x22B" in line for line in words.text)
    assert CAVEAT in words.caption and "Mixtral-8x22B 8" in words.caption


@pytest.mark.parametrize(("lead", "named"), [(1.005, "hd_moe"), (1.02, "hiermoe")])
def test_heat_map_names_the_simpler_system_unless_another_is_faster(
    lead: float, named: str, beyond: dict[str, list[Cell]], small_store: RunStore
) -> None:
    some = [c for c in beyond["heat_map"] if c.config.routing.name == "uniform" and "mixtral" in c.config.model.name]
    fill(small_store, some, lambda c: 46 / 40 / lead if c.system.name == "hiermoe" else 1.0)
    table = heat_map.FIGURE.table(load(indexed(beyond), small_store), [])
    assert table["system"].tolist() == [named] * 2
    assert (table["value"] / table["fixed"]).tolist() == pytest.approx([lead if named == "hiermoe" else 1.0] * 2)


def test_alpha_share_is_of_the_stages_that_were_used(beyond: dict[str, list[Cell]], small_store: RunStore) -> None:
    fill(small_store, beyond["scaling"])
    results = load(indexed(beyond), small_store)
    (run,) = results.find("scaling", system="hd_moe", cluster="h100_ib400@64")
    stages = results.rows(run, "dispatch")
    cluster = run.config.cluster
    alpha_ms = sum(cluster.constants(Peers(kind, 1)).alpha_ms for kind in ("inter", "intra"))
    time_ms = stages.groupby("iteration")["predicted_ms"].sum()
    assert alpha_share(run, results) == pytest.approx(alpha_ms * len(time_ms) / time_ms.sum())


def test_planner_cost_takes_the_least_time_of_the_counted_repeats(
    beyond: dict[str, list[Cell]], small_store: RunStore
) -> None:
    for config in {c.config.run_id: c.config for c in beyond["planner_cost"]}.values():
        experts, tokens = config.model.num_experts, config.tokens_per_rank
        rows = [
            {
                "phase": "planning", "stage": stage, "iteration": i, "routing_iteration": 0, "counted": i > 0,
                "layer": 0, "planning_ms": 1e-9 if i == 0 else base * (1 + (i % 3)), "bytes": size,
            }
            for i in range(5)
            for stage, base, size in (("measure", tokens / 1e3, experts**2), ("decide", experts**2 / 1e4, math.nan))
        ]  # fmt: skip
        write(small_store, config, pd.DataFrame(rows))
    results: Results = load(indexed(beyond), small_store)
    table = planner_cost.FIGURE.table(results, [])
    assert set(table["source"]) == {"local"} and set(table["n"]) == {4}
    assert (table["measure_ms"] == table["tokens_per_rank"] / 1e3).all()
    assert (table["decide_ms"] == table["num_experts"] ** 2 / 1e4).all()
    assert set(zip(table["num_experts"], table["num_ranks"], strict=True)) == {(64, 8), (64, 64), (256, 8), (256, 64)}
    planner_cost.FIGURE.draw(table, "a title")
    words = planner_cost.FIGURE.words(table)
    assert "with tokens (T^1.0)" in words.text[0] and "pairs of experts (E^2.0)" in words.text[0]
    assert "on this machine" in words.title


def test_report_draws_planner_cost_as_numbers_of_this_machine(
    cells: dict[str, list[Cell]], beyond: dict[str, list[Cell]], small_store: RunStore, tmp_path: Path
) -> None:
    write_report(indexed(cells), small_store, tmp_path)
    assert "`hiermoe reproduce --sweeps planner_cost` measures it" in (tmp_path / "report.md").read_text()
    for config in {c.config.run_id: c.config for c in beyond["planner_cost"]}.values():
        write(small_store, config, not_run(), "failed", "made up")
    assert planner_cost.FIGURE.table(load(indexed(beyond), small_store), []).empty
