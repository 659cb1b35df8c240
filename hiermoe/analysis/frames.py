"""Records of sweeps as tidy tables: which runs a sweep has, how each ended, and what it measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import yaml

from hiermoe.records.keep import NONE
from hiermoe.records.store import RunStore
from hiermoe.runs.calibration import CALIBRATED
from hiermoe.runs.compose import Cell
from hiermoe.runs.measurable import source_of
from hiermoe.runs.run_config import RunConfig


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        run_id: its name in the store.
        config: its configuration.
        swept: what the sweep varies, by the last part of the key (``topk``, ``gamma``, ``experiment``, ...).
        source: how its numbers came to be.
        status: ok, failed, not_applicable, or missing where there is no record.
        reason: one line where the status is not ok.
    """

    run_id: str
    config: RunConfig
    swept: dict[str, Any]
    source: str
    status: str
    reason: str

    @property
    def system(self) -> str:
        """Name of the system."""
        return NONE if self.config.system is None else self.config.system.name

    @property
    def label(self) -> str:
        """Of the system, for readers."""
        return NONE if self.config.system is None else self.config.system.label

    @property
    def routing(self) -> str:
        """Name of the routing, ``none`` where none enters."""
        return NONE if self.config.routing is None else self.config.routing.name

    @property
    def num_ranks(self) -> int:
        """G."""
        return self.config.cluster.hierarchy.num_ranks

    @property
    def has_meaning(self) -> bool:
        """False where a sweep crosses group-limited routing with a model whose router has no groups."""
        return self.routing != "group_limited" or self.config.model.router.num_groups is not None

    @property
    def has_derived_constants(self) -> bool:
        """Whether alpha or beta of the cluster are a reading: neither published nor measured."""
        cluster = self.config.cluster
        constants = [cluster.constants(peers) for peers in cluster.exchanges]
        return not all(x.published or x.source.startswith(CALIBRATED) for x in constants)

    def value(self, key: str) -> Any:
        """A swept parameter, or a size of the run; None where the run has no such thing."""
        model = self.config.model
        sizes = {
            "num_ranks": self.num_ranks,
            "num_experts": 0 if model is None else model.num_experts,
            "topk": 0 if model is None else model.topk,
            "model": NONE if model is None else model.name,
            "cluster": self.config.cluster.name,
            "routing": self.routing,
            "source": self.source,
            "status": self.status,
        }
        return sizes[key] if key in sizes else self.swept.get(key)


@dataclass(frozen=True)
class Results:
    """Everything that analysis knows.

    Attributes:
        runs: the runs of every sweep, in the sweep's order.
        records: rows of all runs with status ok, each run once.
        store: where they were read; also has the provenance.
    """

    runs: Mapping[str, Sequence[Run]]
    records: pd.DataFrame
    store: RunStore

    @cached_property
    def _by_phase(self) -> dict[tuple[str, str], pd.DataFrame]:
        grouped = self.records.groupby(["run_id", "phase"], sort=False)
        return {(str(run_id), str(phase)): rows for (run_id, phase), rows in grouped}  # type: ignore[misc]

    def rows(self, run: Run, phase: str, counted_only: bool = True) -> pd.DataFrame:
        """Rows of one run and phase, in order of iteration.

        Of the phase step there is one row per iteration: of a measured run the busiest rank's value of each column. Its
        column ``step_ms`` is the time of the four AlltoAlls: predicted, or of the whole calls, as the source says.

        Args:
            run: status ok.
            phase: of the records.
            counted_only: leave out iterations before the counted window.
        """
        rows = self._by_phase[run.run_id, phase]
        if phase == "step":
            rows = _timed(rows, run.source)
        return rows[rows["counted"]] if counted_only else rows

    def sweep(self, name: str) -> pd.DataFrame:
        """All records of a sweep, with the system's label and one column per swept parameter."""
        columns = [{"run_id": run.run_id, "label": run.label, **run.swept} for run in self.runs.get(name, ())]
        added = pd.DataFrame(columns, columns=["run_id", "label"] if not columns else None)
        added = added.drop(columns=[c for c in added if c != "run_id" and c in self.records])
        return self.records.merge(added.drop_duplicates(), on="run_id")

    def of_source(self, source: str) -> "Results":
        """Only the runs whose numbers came to be in one way."""
        chosen = {name: [run for run in runs if run.source == source] for name, runs in self.runs.items()}
        return Results(chosen, self.records, self.store)

    def find(self, sweep: str, **wanted: Any) -> list[Run]:
        """Runs of a sweep whose values are all as wanted, in the sweep's order, whatever their status.

        ``system`` may be wanted too. Combinations without meaning are left out.
        """
        system = wanted.pop("system", None)
        return [
            run
            for run in self.runs.get(sweep, ())
            if run.has_meaning
            and (system is None or run.system == system)
            and all(run.value(key) == value for key, value in wanted.items())
        ]


def load(cells: Mapping[str, Sequence[Cell]], store: RunStore | None = None) -> Results:
    """Read the records of expanded sweeps, and only those.

    Args:
        cells: expanded sweeps by name.
        store: where records are.
    """
    store = store or RunStore()
    frames: dict[str, pd.DataFrame | None] = {}
    runs: dict[str, list[Run]] = {}
    for name, sweep in cells.items():
        runs[name] = []
        for cell in sweep:
            run_id = cell.config.run_id
            if run_id not in frames:
                try:
                    frames[run_id] = store.read(run_id)
                except FileNotFoundError:
                    frames[run_id] = None
            runs[name].append(_run(cell, run_id, frames[run_id]))
    ok = [frame for frame in frames.values() if frame is not None and frame["status"].iloc[0] == "ok"]
    empty = pd.DataFrame(columns=["run_id", "phase", "counted"])
    return Results(runs, pd.concat(ok, ignore_index=True) if ok else empty, store)


def _timed(steps: pd.DataFrame, source: str) -> pd.DataFrame:
    """One row per iteration, with its time."""
    if source == "simulated":
        return steps.assign(step_ms=steps["predicted_ms"])
    busiest = steps.groupby("iteration", as_index=False).max()
    return busiest.assign(step_ms=busiest["dispatch_ms"])


def _run(cell: Cell, run_id: str, frame: pd.DataFrame | None) -> Run:
    swept = dict(_swept(override) for override in cell.overrides)
    if frame is None:
        reason = f"no record of {run_id}; `hiermoe reproduce` makes it"
        return Run(run_id, cell.config, swept, source_of(cell.config), "missing", reason)
    first = frame.iloc[0]
    return Run(run_id, cell.config, swept, first["source"], first["status"], first["reason"])


def _swept(override: str) -> tuple[str, Any]:
    """``+system.policy.gamma=5.0`` as (``gamma``, 5.0)."""
    key, value = override.split("=", 1)
    return key.lstrip("+~").split(".")[-1], yaml.safe_load(value)
