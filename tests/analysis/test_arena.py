"""The arena's figures and the statements of others: who wins, what pays, and what counts where."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from hiermoe.analysis import expert_time
from hiermoe.analysis.claims import Rule, load_claims, load_rules
from hiermoe.analysis.figures.beyond import arena_memory, arena_rows, arena_tokens, arena_winners
from hiermoe.analysis.frames import Results, load
from hiermoe.analysis.quantities import METRICS, copies
from hiermoe.analysis.statements import statements
from hiermoe.analysis.statistics import Estimate
from hiermoe.analysis.verdicts import judge, judge_all
from hiermoe.analysis.wording import METRICS as WORDS
from hiermoe.records.index import RECORDED
from hiermoe.records.project import STATEMENT_RULES, STATEMENTS
from hiermoe.records.store import RunStore
from hiermoe.runs.compose import Cell, expand, sweep_names
from hiermoe.runs.indexing import indexed
from tests.analysis.conftest import records_of, write

KEPT = ("megatron", "hd_moe", "hiermoe", "ultraep", "eplb", "hiermoe_copies", "placemoe")
Change = Callable[[str, pd.DataFrame], None]


def arena(
    cells: dict[str, list[Cell]], sweep: str, store: RunStore, change: Change, tokens: int | None = None
) -> Results:
    """Made-up records of some systems of a sweep, on one routing."""
    some = [
        one
        for one in cells[sweep]
        if one.config.system.name in KEPT
        and one.config.routing.name in ("uniform", "resampled")
        and one.config.cluster.name.startswith("a6000")
        and (tokens is None or one.config.tokens_per_rank == tokens)
    ]
    for one in some:
        rows = records_of(one.config)
        change(one.config.system.name, rows)
        write(store, one.config, rows)
    return load(indexed({sweep: some}), store)


def net(times: dict[str, tuple[float, float]]) -> Change:
    """Net time and memory by system."""

    def change(system: str, rows: pd.DataFrame) -> None:
        net_ms, slots_gb = times.get(system, (90.0, 5.0))
        rows["net_ms"], rows["slots_gb"], rows["expert_rows_max"] = net_ms, slots_gb, 600.0

    return change


def test_front_has_what_nothing_beats_in_time_and_memory(cells: dict[str, list[Cell]], small_store: RunStore) -> None:
    times = {
        "megatron": (80.0, 0.0), "hd_moe": (50.0, 0.0), "hiermoe": (40.0, 0.0), "ultraep": (45.0, 0.1),
        "hiermoe_copies": (35.0, 0.1), "eplb": (35.0, 0.2), "placemoe": (30.0, 4.0),
    }  # fmt: skip
    table = arena_memory.table(arena(cells, "arena", small_store, net(times)), [])
    assert set(table.loc[table["front"], "system"]) == {"hiermoe", "hiermoe_copies", "placemoe"}
    words = arena_memory.words(table)
    assert "on 1 of 1 routings" in words.title
    assert "PlaceMoE 30.0 ms for 4.00 GB, HierMoE (copies) 35.0 ms for 0.10 GB, EPLB" in words.text[0]


def test_marks_of_all_systems_are_on_the_panels(cells: dict[str, list[Cell]], small_store: RunStore) -> None:
    table = arena_memory.table(arena(cells, "arena", small_store, net({"placemoe": (30.0, 8.0)})), [])
    few = table[table["slots_gb"] < 8].assign(routing_words="of another routing")
    panel = arena_memory.draw(pd.concat([table, few]), "a title").axes[0]
    assert panel.get_xlim()[1] > 8  # the second panel's systems take less


def test_cell_without_any_copies_compares_nothing(cells: dict[str, list[Cell]], small_store: RunStore) -> None:
    results = arena(cells, "arena", small_store, net({}))
    few = {"megatron", *arena_rows.WITHOUT}
    some = [run for run in results.runs["arena"] if run.system in few]
    assert len(some) == 3
    assert arena_rows.rows(Results({"arena": some}, results.records, small_store), ("arena",)).empty


@pytest.mark.parametrize(("copies_ms", "winner"), [(39.9, "hiermoe"), (30.0, "hiermoe_copies")])
def test_winner_is_the_simplest_within_a_hundredth(
    copies_ms: float, winner: str, cells: dict[str, list[Cell]], small_store: RunStore
) -> None:
    times = {"hd_moe": (50.0, 0.0), "hiermoe": (40.0, 0.0), "hiermoe_copies": (copies_ms, 0.1)}
    table = arena_winners.table(arena(cells, "arena", small_store, net(times)), [])
    assert table["system"].tolist() == [winner]
    experts_ms = table["expert_ms"].iloc[0]
    assert table["gain"].iloc[0] == pytest.approx((40.0 + experts_ms) / (times[winner][0] + experts_ms))


def test_balance_can_win_where_net_time_alone_does_not(cells: dict[str, list[Cell]], small_store: RunStore) -> None:
    def change(system: str, rows: pd.DataFrame) -> None:
        rows["net_ms"] = 41.0 if system == "ultraep" else 40.0
        rows["expert_rows_max"] = 1e3 if system == "ultraep" else 4e6

    table = arena_winners.table(arena(cells, "arena", small_store, change), [])
    assert table["system"].tolist() == ["ultraep"] and table["net_label"].tolist() == ["Megatron-LM"]


def test_moves_of_experts_may_change_who_wins(cells: dict[str, list[Cell]], small_store: RunStore) -> None:
    def change(system: str, rows: pd.DataFrame) -> None:
        rows["net_ms"] = {"hiermoe": 40.0, "hd_moe": 45.0}.get(system, 90.0)
        rows["migration_link_ms"] = 7.0 if system == "hiermoe" else 0.0

    table = arena_winners.table(arena(cells, "arena", small_store, change), [])
    assert table["system"].tolist() == ["hiermoe"] and table["moving_label"].tolist() == ["HD-MoE"]
    assert "at the link's rate: HD-MoE 1." in arena_winners.words(table).text[2]


def test_cell_with_a_missing_run_has_no_winner(cells: dict[str, list[Cell]], small_store: RunStore) -> None:
    results = arena(cells, "arena", small_store, net({}))
    run = next(run for run in results.runs["arena"] if run.system == "eplb")
    small_store.records.pop(run.run_id)  # type: ignore[attr-defined] - a MemoryStore
    some = [one for one in cells["arena"] if one.config.run_id in {run.run_id for run in results.runs["arena"]}]
    assert arena_rows.rows(load(indexed({"arena": some}), small_store), ("arena",)).empty


def test_layer_on_which_few_systems_were_simulated_does_not_count(small_store: RunStore) -> None:
    """As where a claim's sweep has been run over layers, which knows no systems with copies, and the arena has not."""
    few = {"megatron", *arena_rows.WITHOUT}
    late = [one for one in expand("arena", RECORDED) if one.config.routing.source["stage"] == "late"]
    some = [one for one in late if one.config.system.name in (few if one.config.routing.source["layer"] else KEPT)]
    for one in some:
        rows = records_of(one.config)
        net({})(one.config.system.name, rows)
        rows["net_ms"] += one.config.routing.source["layer"]
        write(small_store, one.config, rows)
    found = arena_rows.rows(load(indexed({arena_rows.PLACES[0]: some}), small_store), arena_rows.PLACES)
    assert set(found["system"]) == set(KEPT) and (found["places"] == 1).all() and (found["net_ms"] == 90.0).all()


@pytest.mark.parametrize(
    ("ratio", "end"),
    [
        ([0.5, 1.0, 2.0], 1024.0),
        ([0.5, 0.5, 2.0], 2048.0),
        ([2.0, 2.0, 2.0], 256.0),
        ([2.0, 2.0, 0.9], math.inf),
        ([2.0, 0.25, 4.0], 2048.0),
    ],
)
def test_break_even_is_where_it_pays_from_then_on(ratio: list[float], end: float) -> None:
    assert arena_tokens.break_even(np.array([256.0, 1024.0, 4096.0]), np.array(ratio)) == pytest.approx(end)


def test_break_even_table_names_each_system_with_copies(cells: dict[str, list[Cell]], small_store: RunStore) -> None:
    def change(system: str, rows: pd.DataFrame) -> None:
        rows["net_ms"] = {"hd_moe": 40.0, "hiermoe": 30.0, "ultraep": 35.0}.get(system, 90.0)

    table = arena_tokens.table(arena(cells, "arena_tokens", small_store, change), [])
    _, *rows = arena_tokens.words(table).rows
    ends = {row[1]: row[2:4] for row in rows}
    assert ends["UltraEP"] == ("always (from 256)", "never") and ends["EPLB (global)"] == ("never", "never")
    assert set(ends) == {"UltraEP", "EPLB (global)", "HierMoE (copies)", "PlaceMoE"}


def test_experts_take_six_operations_a_parameter_and_row() -> None:
    rows = pd.Series([1000, 2000])
    assert expert_time.expert_ms(rows, 10**6, tflops=10.0).tolist() == pytest.approx([0.6, 1.2])
    with pytest.raises(ValueError, match="tflops=0"):
        expert_time.expert_ms(rows, 10**6, tflops=0)


CEILING = Rule(rule="ceiling", reason="", tolerance=0.01, near=0.1)
FACTOR = Rule(rule="factor", reason="", tolerance=0.25, near=1.0)


@pytest.mark.parametrize(
    ("rule", "value", "low", "high", "verdict"),
    [
        (CEILING, 1.05, 1.01, 1.04, "reproduced"),
        (CEILING, 1.06, 1.01, 1.04, "same direction"),
        (CEILING, 1.15, 1.01, 1.04, "contradicted"),
        (FACTOR, 63.0, 38, 51, "reproduced"),
        (FACTOR, 31.0, 38, 51, "reproduced"),
        (FACTOR, 20.0, 38, 51, "same direction"),
        (FACTOR, 18.0, 38, 51, "contradicted"),
        (FACTOR, 103.0, 38, 51, "contradicted"),
    ],
)
def test_rules_of_statements(rule: Rule, value: float, low: float, high: float, verdict: str) -> None:
    assert judge(Estimate(value, value, value, 8), low, high, rule)[0] == verdict


def test_every_statement_has_a_rule_a_sweep_and_words() -> None:
    claims, rules = load_claims(STATEMENTS), load_rules(STATEMENT_RULES)
    assert {claim.metric for claim in claims} == set(rules.metrics)
    for claim in claims:
        assert claim.sweep(rules) in sweep_names() and claim.metric in WORDS
        assert claim.metric in METRICS or "simulated" in rules.metrics[claim.metric].not_testable
    rack = next(claim for claim in claims if claim.claim == "UEP-copies-64")
    assert rack.sweep(rules) == "arena_rack"
    assert rack.wanted == {"num_ranks": 64, "num_experts": 256, "tokens_per_rank": 8192}


def test_statements_are_judged_where_there_are_records_and_count_apart(
    cells: dict[str, list[Cell]], small_store: RunStore
) -> None:
    def change(system: str, rows: pd.DataFrame) -> None:
        rows["expert_rows_max"] = {"megatron": 1000.0, "eplb": 500.0, "ultraep": 600.0}.get(system, 1.0) * 1.0
        rows["expert_rows_mean"] = 500.0

    results = arena(cells, "arena", small_store, change)
    found = statements(results)
    assert found is not None and found.columns == ("uniform",)
    verdicts = {one.claim.claim: one.verdict for one in found.judged}
    assert verdicts["UEP-before"] == "reproduced" and verdicts["EPLB-global"] == "reproduced"
    assert verdicts["UEP-after"] == "contradicted"
    assert "LAER-balance" not in verdicts and "UEP-copies-64" not in verdicts  # no such runs
    own = judge_all(load_claims(), load_rules(), results)
    assert not verdicts.keys() & {one.claim.claim for one in own}
    assert {one.verdict for one in own} == {"not testable"}
    assert statements(Results({}, results.records.iloc[:0], small_store)) is None


def test_copies_are_counted_by_the_gradients_that_they_send(
    cells: dict[str, list[Cell]], small_store: RunStore
) -> None:
    parameters = 3 * 2048 * 768  # of an expert of Qwen3-30B-A3B

    def change(system: str, rows: pd.DataFrame) -> None:
        rows["gradient_bytes"] = 7 * 4.0 * parameters

    results = arena(cells, "arena", small_store, change)
    (run,) = results.find("arena", system="ultraep")
    assert copies(run, results).value == pytest.approx(7)
