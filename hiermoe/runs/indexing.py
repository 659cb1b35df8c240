"""The index of runs that a report is made from: all simulated sweeps, and what has been measured and trained so far."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import yaml

from hiermoe.records.index import PREDICTIONS, Index, IndexedRun
from hiermoe.records.store import RunStore
from hiermoe.runs.compose import Cell, expand, large_sweep_names, sweep_names
from hiermoe.runs.measured_cells import measured_so_far
from hiermoe.runs.routings import names_over_places, sweeps_over_places
from hiermoe.runs.training import trainings


def index_runs(store: RunStore, expanded: Mapping[str, Sequence[Cell]] | None = None) -> Index:
    """All runs that a report may show.

    Args:
        store: where records are.
        expanded: sweeps that are expanded already, by name; the others are expanded here.
    """
    given = expanded or {}
    cells: dict[str, list[Cell[Any]]] = {
        name: [*(given[name] if name in given else expand(name))] for name in sweep_names()
    }
    measured = measured_so_far(store)
    for one in measured:
        cells.setdefault(one.sweep, []).append(one.measured)  # some are measured only
    cells[PREDICTIONS] = [one.predicted for one in measured]
    # Over places, and beyond the paper, a report shows what there is.
    places = {name: given[name] for name in names_over_places() if name in given} or sweeps_over_places()
    cells |= {name: _done(sweep, store) for name, sweep in places.items()}
    # Large sweeps go on from the sweep of their name.
    long = {name.removeprefix("large/"): expand(name) for name in large_sweep_names()} | trainings(store)
    for name, sweep in long.items():
        cells.setdefault(name, []).extend(_done(sweep, store))
    return indexed(cells)


def _done(cells: Iterable[Cell[Any]], store: RunStore) -> list[Cell[Any]]:
    return [cell for cell in cells if store.has(cell.run_id)]


def indexed(cells: Mapping[str, Iterable[Cell[Any]]]) -> Index:
    """These runs and no others.

    Args:
        cells: expanded sweeps, by name.
    """
    return {name: [_entry(cell) for cell in sweep] for name, sweep in cells.items()}


def _entry(cell: Cell[Any]) -> IndexedRun:
    config = cell.config
    return IndexedRun(cell.run_id, config, config.keys, dict(_swept(override) for override in cell.overrides))


@lru_cache(maxsize=4096)
def _swept(override: str) -> tuple[str, Any]:
    """``+system.policy.gamma=5.0`` as (``gamma``, 5.0)."""
    key, value = override.split("=", 1)
    return key.lstrip("+~").split(".")[-1], yaml.safe_load(value)
