"""Systems that keep experts in more than one place: what they take on a case, and what copies cost in ms and GB."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from hiermoe.advice.case import Case
from hiermoe.advice.systems import Candidate
from hiermoe.analysis.expert_time import TFLOPS, expert_ms
from hiermoe.measure.predict import simulate
from hiermoe.measure.workload import CachedRouting, Workload
from hiermoe.routing.step import RoutingStep

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class _SeenThenJudged:
    """All iterations of a case in their order: those that are decided from, then those that count."""

    case: Case
    num_distinct: None = None

    def step(self, iteration: int) -> RoutingStep:
        seen, judged = self.case.schedules
        if iteration < len(seen):
            return self.case.routing.step(seen[iteration])
        return self.case.judging.step(judged[iteration - len(seen)])


def expert_tflops(case: Case) -> float:
    """10^12 operations a second of a GPU on experts: as stated (``compute.``), else what the arena assumes."""
    return TFLOPS if case.compute is None else case.compute.expert_tflops


def assess_copies(case: Case, systems: Sequence[Candidate], progress: Progress) -> pd.DataFrame:
    """Walk through a case with each system, which goes on to decide in the iterations that count: copies are of a step.

    Args:
        case: one layer.
        systems: with copies, and those without that they are held against.
        progress: called with a label and the number of an iteration that is done.

    Returns:
        One row per system, in their order, means over the iterations that count; no row for no system.

    Columns:
        system, label: which.
        copies: whether it makes any.
        alltoall_ms: of the four AlltoAlls of a step.
        net_ms: with weights and gradients of copies, at the link's rate, as if nothing hid them.
        expert_ms: of the busiest GPU, at `expert_tflops`.
        layer_ms: net_ms and expert_ms.
        imbalance: expert rows of the busiest GPU over the mean.
        layer_gb: memory of one layer's copies at a GPU.
        model_gb: of all layers that keep them; NaN where their number is not known.
    """
    seen, judged = case.schedules
    routing, sizes = CachedRouting(_SeenThenJudged(case)), replace(case.sizes, num_layers=1)
    rows = []
    for one in systems:
        label, system, terms = one.label, one.system, one.system.build_policy().copies
        workload = Workload(
            system,
            one.schemes,
            system.build_policy,
            case.cluster,
            routing,
            case.layer,
            sizes,
            len(seen) + len(judged),
        )
        run = simulate(workload, lambda iteration, label=label: progress(label, iteration))
        steps = run[(run["phase"] == "step") & (run["iteration"] >= len(seen))]
        experts_ms = float(expert_ms(steps["expert_rows_max"], sizes.expert_parameters, expert_tflops(case)).mean())
        net_ms, layer_gb = float(steps["net_ms"].mean()), float(steps["slots_gb"].max())
        layers = 1 if terms is None or terms.shared_buffers else case.sizes.num_layers or float("nan")
        rows.append(
            {
                "system": one.name,
                "label": label,
                "copies": terms is not None,
                "alltoall_ms": float(steps["predicted_ms"].mean()),
                "net_ms": net_ms,
                "expert_ms": experts_ms,
                "layer_ms": net_ms + experts_ms,
                "imbalance": float((steps["expert_rows_max"] / steps["expert_rows_mean"]).mean()),
                "layer_gb": layer_gb,
                "model_gb": layer_gb * layers,
            }
        )
    return pd.DataFrame(rows)


def summed_copies(layers: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Several layers as one table: times added up, the imbalance their mean, memory the largest.

    Args:
        layers: as :func:`assess_copies` makes them, with the same systems.
    """
    every = pd.concat(layers)
    if every.empty:
        return every
    times = ["alltoall_ms", "net_ms", "expert_ms", "layer_ms"]
    rest = {"imbalance": "mean", "layer_gb": "max", "model_gb": "max"}
    grouped = every.groupby(["system", "label", "copies"], sort=False)
    return grouped.agg({**dict.fromkeys(times, "sum"), **rest}).reset_index()
