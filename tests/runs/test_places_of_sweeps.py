"""Which runs of a sweep are made over places of a routing."""

import pytest

from hiermoe.records.index import RECORDED, over
from hiermoe.records.store import RunStore
from hiermoe.runs.compose import expand
from hiermoe.runs.execute import execute
from hiermoe.runs.indexing import index_runs
from hiermoe.runs.routings import names_over_places, sweeps_over_places


def test_over_places_come_systems_that_claims_name_and_all_of_what_stands_beside() -> None:
    found = {name: {cell.config.system.name for cell in cells} for name, cells in sweeps_over_places().items()}
    named = {"megatron", "tutel_2dh", "hd2_moe", "hd2_moe_smart", "hd_moe", "hiermoe"}  # in results/published.csv
    assert found[over("fig11", RECORDED)] == named
    assert found[over("fig10", RECORDED)] == named - {"tutel_2dh", "hd_moe"}
    beside = over("structure", RECORDED)
    assert len(sweeps_over_places()[beside]) == len(expand("structure", RECORDED))
    assert "hiermoe_search" in found[beside]
    arena = over("arena", RECORDED)
    assert found[arena] == {cell.config.system.name for cell in expand("arena")}
    assert arena not in names_over_places(beyond=False)


def test_an_entrant_is_over_places_too(monkeypatch) -> None:
    entrant = {"smartmoe_f1"}  # of the sweep, and of no claim

    def with_entrant(sweep: str, routings: str) -> list:
        cells = expand(sweep, routings)
        for cell in cells:
            if cell.config.system.name in entrant:
                system = cell.config.system.model_copy(update={"entrant": True})
                object.__setattr__(cell, "config", cell.config.model_copy(update={"system": system}))
        return cells

    monkeypatch.setattr("hiermoe.runs.routings.expand", with_entrant)
    systems = {cell.config.system.name for cell in sweeps_over_places()[over("fig11", RECORDED)]}
    assert entrant < systems and "smartmoe" not in systems


@pytest.mark.slow
def test_an_index_has_places_whether_or_not_they_were_expanded_before(store: RunStore) -> None:
    places = sweeps_over_places()
    first = next(cell for sweep in places.values() for cell in sweep)
    execute(first.config, store)
    found = index_runs(store)
    assert found.keys() >= names_over_places().keys()
    assert [run.run_id for name in names_over_places() for run in found[name]].count(first.run_id) >= 1
    assert {name: len(sweep) for name, sweep in index_runs(store, places).items()} == {
        name: len(sweep) for name, sweep in found.items()
    }
