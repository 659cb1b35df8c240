"""Records of sweeps as tidy tables: which runs a sweep has, how each ended, and what it measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from hiermoe.planner.fit import CALIBRATED
from hiermoe.records.checksums import Damaged
from hiermoe.records.index import PREDICTIONS, Index, IndexedRun
from hiermoe.records.keep import NONE
from hiermoe.records.store import RunStore


@dataclass(frozen=True)
class Run(IndexedRun):
    """One run of a sweep, and how it ended.

    Attributes:
        status: ok, failed, not_applicable, or missing where there is no record.
        reason: one line where the status is not ok.
    """

    status: str
    reason: str

    @property
    def source(self) -> str:
        """How its numbers came to be."""
        return self.keys["source"]

    @property
    def system(self) -> str:
        """Name of the system, ``none`` where none enters."""
        return self.keys["system"]

    @property
    def label(self) -> str:
        """Of the system, for readers."""
        return NONE if self.config.system is None else self.config.system.label

    @property
    def routing(self) -> str:
        """Name of the routing, ``none`` where none enters."""
        return self.keys["routing"]

    @property
    def place(self) -> str:
        """Where in a model and its training the routing was recorded; empty where it was not."""
        source = {} if self.config.routing is None else self.config.routing.source
        words = [
            source.get("name"),
            source.get("stage"),
            f"MoE layer {source['layer'] + 1}" if "layer" in source else "",
        ]
        return ", ".join(filter(None, words))

    @property
    def num_ranks(self) -> int:
        """G."""
        return self.keys["num_ranks"]

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
        """A size of the run or a swept parameter; None where the run has no such thing."""
        return {**self.swept, **self.keys, "status": self.status}.get(key)


@dataclass(frozen=True)
class Results:
    """Everything that analysis knows.

    Attributes:
        runs: the runs of every sweep, in the sweep's order.
        records: rows of all runs with status ok, each run once.
        store: where they were read; also has the provenance.
        damaged: runs whose records are left out because they are not what was written, with what is wrong.
    """

    runs: Mapping[str, Sequence[Run]]
    records: pd.DataFrame
    store: RunStore
    damaged: Mapping[str, str] = field(default_factory=dict)
    _parts: dict[tuple[str, str, bool], pd.DataFrame] = field(default_factory=dict, repr=False)  # answers of rows()

    def rows(self, run: Run, phase: str, counted_only: bool = True) -> pd.DataFrame:
        """Rows of one run and phase, in order of iteration.

        Of the phase step there is one row per iteration: of a measured run the busiest rank's value of each column. Its
        column ``step_ms`` is the time of the four AlltoAlls: predicted, or of the whole calls, as the source says.

        Args:
            run: status ok.
            phase: of the records.
            counted_only: leave out iterations before the counted window.
        """
        if not self._parts:
            self._parts.update(_by_phase(self.records))
        key = run.run_id, phase, counted_only
        if key not in self._parts:
            rows = self._parts[run.run_id, phase, False]
            self._parts[key] = rows[rows["counted"]]
        return self._parts[key]

    def sweep(self, name: str) -> pd.DataFrame:
        """All records of a sweep, with the system's label and one column per swept parameter."""
        columns = [{"run_id": run.run_id, "label": run.label, **run.swept} for run in self.runs.get(name, ())]
        added = pd.DataFrame(columns, columns=["run_id", "label"] if not columns else None)
        added = added.drop(columns=[c for c in added if c != "run_id" and c in self.records])
        return self.records.merge(added.drop_duplicates(), on="run_id")

    def of_source(self, source: str) -> "Results":
        """Only the runs whose numbers came to be in one way, and what was predicted for the measured ones."""
        chosen = {
            name: [run for run in runs if run.source == source or name == PREDICTIONS]
            for name, runs in self.runs.items()
        }
        return Results(chosen, self.records, self.store, self.damaged, self._parts)

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


def load(index: Index, store: RunStore | None = None) -> Results:
    """Read the records of the runs of an index, and only those.

    Args:
        index: runs by sweep.
        store: where records are.
    """
    store = store or RunStore()
    entries = {entry.run_id: entry for sweep in index.values() for entry in sweep}
    frames: dict[str, pd.DataFrame] = {}
    damaged: dict[str, str] = {}
    for run_id in entries:
        if store.has(run_id):
            try:
                frames[run_id] = store.read(run_id)
            except Damaged as error:
                damaged[run_id] = error.why
    runs = {
        name: [_run(entry, frames.get(entry.run_id), damaged.get(entry.run_id)) for entry in sweep]
        for name, sweep in index.items()
    }
    ok = [frame for frame in frames.values() if frame["status"].iloc[0] == "ok"]
    empty = pd.DataFrame(columns=["run_id", "phase", "counted"])
    return Results(runs, pd.concat(ok, ignore_index=True) if ok else empty, store, damaged)


def _by_phase(records: pd.DataFrame) -> dict[tuple[str, str, bool], pd.DataFrame]:
    """All rows of every run and phase, those of the phase step with ``step_ms``."""
    is_step = records["phase"] == "step"
    parts = [records[~is_step]] + ([step_times(records[is_step])] if is_step.any() else [])
    return {
        (str(run_id), str(phase), False): rows
        for part in parts
        for (run_id, phase), rows in part.groupby(["run_id", "phase"], sort=False)  # type: ignore[misc]
    }


def step_times(steps: pd.DataFrame) -> pd.DataFrame:
    """Rows of phase step, one per run and iteration, with the time of the four AlltoAlls in a column ``step_ms``.

    That is what is predicted; of measured runs, of whose ranks the busiest counts, that of the whole calls.

    Args:
        steps: rows of phase step, of one run or several.
    """
    is_simulated = steps["source"] == "simulated"
    simulated = steps[is_simulated]
    busiest = steps[~is_simulated].groupby(["run_id", "iteration"], as_index=False, sort=False).max()
    parts = {"predicted_ms": simulated, "dispatch_ms": busiest}
    return pd.concat([part.assign(step_ms=part[time]) for time, part in parts.items() if len(part)])


def typical_ms(steps: pd.DataFrame) -> pd.Series:
    """Time of the four AlltoAlls by run: the mean of predicted times, the median of measured ones, which have outliers.

    Args:
        steps: rows of phase step that count, of one run or several.
    """
    times = step_times(steps).groupby(["run_id", "source"])["step_ms"].agg(["mean", "median"]).reset_index("source")
    return times["mean"].where(times["source"] == "simulated", times["median"])


def _run(entry: IndexedRun, frame: pd.DataFrame | None, damage: str | None) -> Run:
    if frame is None:
        why = (
            f"no record of {entry.run_id}" if damage is None else f"the record of {entry.run_id} is damaged ({damage})"
        )
        return Run(**vars(entry), status="missing", reason=f"{why}; `hiermoe reproduce` makes it")
    first = frame.iloc[0]
    return Run(**vars(entry), status=first["status"], reason=first["reason"])
