"""Rows that several figures plot: speed-ups of a sweep's runs, and the published number beside each."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.frames import Results, Run
from hiermoe.analysis.quantities import speedup
from hiermoe.analysis.statistics import Estimate, ratio_of_sums

BASELINE_SWEEP = "fig11"


def row_of(run: Run, estimate: Estimate, **more: Any) -> dict[str, Any]:
    """What every plotted number carries."""
    return {
        "source": run.source,
        "system": run.system,
        "label": run.config.system.label,
        "model": run.config.model.name,
        "cluster": run.config.cluster.name,
        "routing": run.routing,
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "n": estimate.n,
        **more,
    }


def counterpart(run: Run, system: str, sweep: str, results: Results) -> Run | None:
    """The run of another system that differs in nothing else that routing or prices depend on, if it has numbers.

    Looked for in the same sweep, then among the baselines' runs (policies of one system share a baseline there).
    """
    return next((other for other in _alike(run, sweep, results) if other.system == system), None)


def unmoved(run: Run, sweep: str, results: Results) -> Run | None:
    """The counterpart of the same dispatch with experts fixed."""
    schemes = run.config.system.schemes
    same = (other for other in _alike(run, sweep, results) if other.config.system.schemes == schemes)
    return next((other for other in same if not other.config.system.moves), None)


def _alike(run: Run, sweep: str, results: Results) -> list[Run]:
    keys = {key: run.value(key) for key in ("source", "model", "cluster", "routing", "num_experts", "topk")}
    return [other for name in (sweep, BASELINE_SWEEP) for other in results.find(name, status="ok", **keys)]


def over_fixed(rows: pd.DataFrame) -> Estimate:
    """Speed-up over experts that stay: ``static_ms`` over ``predicted_ms``."""
    return ratio_of_sums(rows["static_ms"].to_numpy(float), rows["predicted_ms"].to_numpy(float))


def speedups(
    results: Results,
    sweep: str,
    baseline: str,
    describe: Callable[[Run, Run], dict[str, float]] = lambda run, other: {},
) -> pd.DataFrame:
    """AlltoAll speed-up of every run of a sweep over a baseline, the baseline itself left out.

    Args:
        results: all runs.
        sweep: whose runs.
        baseline: system.
        describe: further columns, from the run and its baseline.

    Returns:
        One row per run, with one column per swept parameter.
    """
    rows = []
    for run in results.find(sweep, status="ok"):
        other = counterpart(run, baseline, sweep, results)
        if other is not None and run.run_id != other.run_id:
            rows.append(row_of(run, speedup(run, other, results), **describe(run, other)) | run.swept)
    return pd.DataFrame(rows)


def complete(table: pd.DataFrame, systems: set[str], by: list[str]) -> pd.DataFrame:
    """Without the groups of rows that lack one of the systems that a figure speaks of."""
    if table.empty:
        return table
    return pd.concat(
        [rows.iloc[:0] if systems - set(rows["system"]) else rows for _, rows in table.groupby(by, sort=False)]
    )


def published(claims: Sequence[Claim], **fields: object) -> tuple[float, float]:
    """Published ends of the first claim with these fields; NaN, NaN where there is none."""
    for claim in claims:
        if all(getattr(claim, name) == value for name, value in fields.items()):
            return claim.low, claim.high
    return math.nan, math.nan
