"""Run one configuration and keep its record."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pandas as pd

from hiermoe.backends.emulated.run import run_emulated
from hiermoe.backends.local import run_local
from hiermoe.backends.simulated import simulate
from hiermoe.backends.streams import RunDied
from hiermoe.backends.synthetic_timings import synthetic_timings
from hiermoe.harness.config import RunConfig
from hiermoe.records.provenance import collect
from hiermoe.records.status import NotApplicable, Status
from hiermoe.records.store import RunStore

SOURCE_OF_BACKEND = {
    "simulated": "simulated",
    "synthetic_timings": "simulated",
    "local": "local",
    "emulated": "emulated",
}  # what a record says of its numbers


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run_id: its name in the store.
        status: ok, failed or not_applicable.
        reason: one line for the latter two.
        cached: whether the record was there already.
        seconds: time taken.
    """

    run_id: str
    status: Status
    reason: str
    cached: bool
    seconds: float


def execute(config: RunConfig, store: RunStore, progress: Callable[[int], None] = lambda iteration: None) -> Outcome:
    """Run a configuration unless its record is there, and store the record.

    Args:
        config: what to run.
        store: where records are.
        progress: called with the number of every finished iteration.

    Returns:
        The outcome.
    """
    keys = {
        "source": SOURCE_OF_BACKEND[config.backend.name],
        "system": config.system.name,
        "model": config.model.name,
        "cluster": config.cluster.name,
        "routing": config.routing.name,
        "seed": config.seed,
        "num_experts": config.model.num_experts,
        "topk": config.model.topk,
        "num_ranks": config.cluster.hierarchy.num_ranks,
        "tokens_per_rank": config.tokens_per_rank,
    }
    return keep_record(config.run_id, config.content, keys, lambda: _measure(config, progress), store)


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
    started = time.perf_counter()
    if store.is_done(run_id):
        first = store.read(run_id).iloc[0]
        return Outcome(run_id, first["status"], first["reason"], True, time.perf_counter() - started)
    status: Status = "ok"
    reason = ""
    try:
        rows = measure()
    except NotApplicable as error:
        status, reason, rows = "not_applicable", str(error), _single_row()
    except RunDied as error:
        status, reason, rows = "failed", str(error), _single_row() if error.rows.empty else error.rows
    except (ValueError, OSError) as error:
        status, reason, rows = "failed", str(error), _single_row()
    seconds = time.perf_counter() - started
    rows = rows.assign(run_id=run_id, **keys, status=status, reason=reason)
    store.write(run_id, content, collect() | {"seconds": round(seconds, 3)} | (provenance or {}), rows)
    return Outcome(run_id, status, reason, False, seconds)


def _measure(config: RunConfig, progress: Callable[[int], None]) -> pd.DataFrame:
    if config.backend.name == "synthetic_timings":
        return synthetic_timings(config.cluster, config.seed)
    if config.backend.starts_ranks:
        assert config.backend.timeout_s is not None
        run = run_emulated if config.backend.name == "emulated" else run_local
        return run(config.workload(), timedelta(seconds=config.backend.timeout_s), progress)
    return simulate(config.workload(), progress)


def _single_row() -> pd.DataFrame:
    """The one row of a run without measurements."""
    return pd.DataFrame(
        [{"iteration": -1, "routing_iteration": -1, "measured": False, "layer": -1, "phase": "run", "stage": "all"}]
    )
