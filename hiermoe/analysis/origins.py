"""Where the report's numbers come from: the runs' provenance and the traces behind recorded routing."""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hiermoe.analysis.frames import Results
from hiermoe.records.project import shown
from hiermoe.routing.trace import TraceMetadata, recorded_path


@dataclass(frozen=True)
class TraceFacts:
    """A trace, as the report states it.

    Attributes:
        path: below the project's root.
        metadata: as recorded; None where nobody recorded it.
        imbalance: busiest GPU's token-expert pairs over the mean, of Megatron-LM; None without records.
    """

    path: str
    metadata: TraceMetadata | None
    imbalance: float | None


def trace_facts(results: Results) -> list[TraceFacts]:
    """Every trace that some run asks for, in the order of the sweeps."""
    asked: dict[Path, float | None] = {}
    for sweep in results.runs:
        for run in results.find(sweep, routing="recorded"):
            path = recorded_path(run.config.routing.source["path"], run.config.request)
            if asked.get(path) is None:
                plain = (
                    run.status == "ok"
                    and run.source == "simulated"
                    and run.system == "megatron"
                    and not {"topk", "experiment"} & set(run.swept)
                )
                asked[path] = _imbalance(results.rows(run, "step")) if plain else None
    return [TraceFacts(shown(path), _metadata(path), imbalance) for path, imbalance in asked.items()]


def _imbalance(steps: pd.DataFrame) -> float:
    return float((steps["expert_rows_max"] / steps["expert_rows_mean"]).mean())


def _metadata(path: Path) -> TraceMetadata | None:
    """Only the header: the arrays take seconds to unpack."""
    if not path.exists():
        return None
    with zipfile.ZipFile(path) as archive:
        return TraceMetadata(**json.loads(archive.read("metadata.json"))["metadata"])


def run_provenance(results: Results) -> list[dict[str, Any]]:
    """What made the runs: one entry per combination of commit, versions and source, with the number of its runs."""
    groups: dict[str, dict[str, Any]] = {}
    for source, provenance in _provenances(results):
        shown = {
            "source": source,
            "commit": (provenance["commit"] or "unknown")[:10],
            "uncommitted_changes": provenance["uncommitted_changes"],
            "versions": provenance["versions"],
            "platform": provenance["platform"],
        }
        group = groups.setdefault(json.dumps(shown, sort_keys=True), {**shown, "runs": 0, "seconds": 0.0})
        group["runs"] += 1
        group["seconds"] += provenance["seconds"]
    return sorted(groups.values(), key=lambda group: -group["runs"])


def _provenances(results: Results) -> Iterator[tuple[str, dict[str, Any]]]:
    seen: set[str] = set()
    for runs in results.runs.values():
        for run in runs:
            if run.run_id not in seen and run.status != "missing":
                seen.add(run.run_id)
                yield run.source, results.store.provenance(run.run_id)
