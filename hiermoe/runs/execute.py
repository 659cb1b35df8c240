"""Run configurations and keep their records."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pandas as pd

from hiermoe.measure.bound import bound_times
from hiermoe.measure.plan_cost import planning_cost
from hiermoe.measure.predict import simulate
from hiermoe.measure.replay import replay_together, split_by_system
from hiermoe.measure.self_test import synthetic_timings
from hiermoe.measure.workload import Workload
from hiermoe.ranks.streams import RunDied
from hiermoe.ranks.worlds import World, world_of
from hiermoe.records.provenance import collect
from hiermoe.records.status import NotApplicable, Status
from hiermoe.records.store import RunStore
from hiermoe.runs.run_config import RunConfig

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run_id: its name in the store.
        status: ok, failed or not_applicable.
        reason: one line for the latter two.
        cached: whether the record was there already.
        seconds: time taken; of runs that were measured together, an equal share.
    """

    run_id: str
    status: Status
    reason: str
    cached: bool
    seconds: float


def execute(config: RunConfig, store: RunStore, progress: Progress = lambda iteration: None) -> Outcome:
    """Run a configuration on this machine unless its record is there, and store the record.

    Args:
        config: what to run.
        store: where records are.
        progress: called with the number of every finished iteration.

    Returns:
        The outcome.
    """
    if config.backend.starts_ranks:
        return execute_together([config], store, progress)[0]

    def predict() -> pd.DataFrame:
        if config.backend.name == "synthetic_timings":
            return synthetic_timings(config.cluster, config.seed)
        if config.backend.name == "planning":
            return planning_cost(config.workload())
        if config.backend.name == "bounds":
            return bound_times(config.workload(), progress)
        return simulate(config.workload(), progress)

    return keep_record(config.run_id, config.content, keys_of(config, config.backend.source), predict, store)


def execute_together(
    configs: Sequence[RunConfig],
    store: RunStore,
    progress: Progress = lambda iteration: None,
    world: World | None = None,
) -> list[Outcome]:
    """Measure configurations that differ in their system alone, interleaved, on the same ranks.

    Those that have a record are left out. One that turns out not to apply ends no other.

    Args:
        configs: of a backend that has ranks.
        store: where records are.
        progress: called with the number of every finished iteration.
        world: the ranks; None for new ones on this machine.

    Returns:
        The outcomes, in the order of the configurations.
    """
    cached = {config.run_id: _cached(config.run_id, store) for config in configs}
    missing = [config for config in configs if cached[config.run_id] is None]
    done = {outcome.run_id: outcome for outcome in cached.values() if outcome is not None}
    if missing:
        done |= {outcome.run_id: outcome for outcome in _measure(missing, store, progress, world)}
    return [done[config.run_id] for config in configs]


def keep_record(
    run_id: str,
    content: dict[str, Any],
    keys: dict[str, Any],
    measure: Callable[[], pd.DataFrame],
    store: RunStore,
    provenance: dict[str, Any] | None = None,
) -> Outcome:
    """Measure and store the record, unless it is there.

    Args:
        run_id: name of the run.
        content: its configuration.
        keys: key columns that all its rows share.
        measure: makes the rows, without these keys.
        store: where records are.
        provenance: what the record should tell beside code, host and versions.

    Returns:
        The outcome. A run that does not apply or that failed keeps a row with the reason, or the rows that it had.
    """
    cached = _cached(run_id, store)
    if cached is not None:
        return cached
    attempt = _Attempt()
    with attempt:
        attempt.rows = measure()
    return attempt.keep(run_id, content, keys, store, provenance)


class _Attempt:
    """Rows, or why there are none: what is expected to go wrong becomes a status."""

    def __init__(self, share: int = 1) -> None:
        self.rows = pd.DataFrame()
        self.status: Status = "ok"
        self.reason = ""
        self._share = share
        self._started = time.perf_counter()

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        self.seconds = (time.perf_counter() - self._started) / self._share
        if isinstance(error, NotApplicable):
            self.status, self.reason = "not_applicable", str(error)
        elif isinstance(error, RunDied):
            self.status, self.reason, self.rows = "failed", str(error), error.rows
        elif isinstance(error, ValueError | OSError):
            self.status, self.reason = "failed", str(error)
        return error is None or self.status != "ok"

    def keep(
        self,
        run_id: str,
        content: dict[str, Any],
        keys: dict[str, Any],
        store: RunStore,
        provenance: dict[str, Any] | None = None,
        rows: pd.DataFrame | None = None,
    ) -> Outcome:
        """Store the record, of all rows or of some."""
        rows = self.rows if rows is None else rows
        rows = (_single_row() if rows.empty else rows).assign(
            run_id=run_id, **keys, status=self.status, reason=self.reason
        )
        store.write(run_id, content, collect() | {"seconds": round(self.seconds, 3)} | (provenance or {}), rows)
        return Outcome(run_id, self.status, self.reason, False, self.seconds)


def _cached(run_id: str, store: RunStore) -> Outcome | None:
    started = time.perf_counter()
    if not store.is_done(run_id):
        return None
    first = store.read(run_id).iloc[0]
    return Outcome(run_id, first["status"], first["reason"], True, time.perf_counter() - started)


def keys_of(config: RunConfig, source: str) -> dict[str, Any]:
    """Columns that all rows of a run share."""
    return {
        "source": source,
        "system": config.system.name,
        "model": config.model.name,
        "cluster": config.cluster.name,
        "routing": config.routing.name,
        "seed": config.seed,
        "num_experts": config.model.num_experts,
        "topk": config.model.topk,
        "num_ranks": config.cluster.hierarchy.num_ranks,
        "tokens_per_rank": config.tokens_per_rank,
        "row_bytes": config.row_bytes,
    }


def _measure(
    configs: Sequence[RunConfig], store: RunStore, progress: Progress, world: World | None
) -> Iterator[Outcome]:
    """Measure runs that have no record; those without meaning are found before any rank is asked."""
    backend = configs[0].backend
    assert backend.timeout_s is not None
    timeout = timedelta(seconds=backend.timeout_s)
    source = backend.source if world is None else world.source
    workloads: list[tuple[RunConfig, Workload]] = []
    for config in configs:
        attempt = _Attempt()
        with attempt:
            workloads.append((config, config.workload()))
        if attempt.status != "ok":
            yield attempt.keep(config.run_id, config.content, keys_of(config, source), store)
    if not workloads:
        return
    attempt, parts = _Attempt(len(workloads)), []
    with attempt, _world(configs[0], world) as ranks:
        parts = replay_together([workload for _, workload in workloads], timeout, ranks, progress)
    if attempt.status == "not_applicable" and len(workloads) > 1:  # one of them; which one, each finds out alone
        for config, _ in workloads:
            yield from _measure([config], store, progress, world)
        return
    parts = parts or split_by_system(attempt.rows, len(workloads))
    for (config, _), rows in zip(workloads, parts, strict=True):
        yield attempt.keep(config.run_id, config.content, keys_of(config, source), store, rows=rows)


@contextmanager
def _world(config: RunConfig, given: World | None) -> Iterator[World]:
    if given is not None:
        yield given
    else:
        with world_of(config.backend.name, config.cluster) as world:
            yield world


def _single_row() -> pd.DataFrame:
    """The one row of a run without measurements."""
    return pd.DataFrame(
        [{"iteration": -1, "routing_iteration": -1, "counted": False, "layer": -1, "phase": "run", "stage": "all"}]
    )
