"""No system at all: the time that no placement of experts can beat, for the same routing and schemes."""

import pandas as pd

from hiermoe.measure.workload import Workload
from hiermoe.planner.bounds import MateBound, least_traffic
from hiermoe.planner.cost import ALLTOALLS_PER_STEP
from hiermoe.planner.token_sets import TokenSets
from hiermoe.ranks.world import Progress, no_progress


def bound_times(workload: Workload, progress: Progress = no_progress) -> pd.DataFrame:
    """Bound the AlltoAll time of every counted iteration of one layer.

    Args:
        workload: its system says which schemes there are; no policy runs.
        progress: called with the number of every finished iteration.

    Returns:
        Rows of the phases routing (fewest rows of every level) and step (least time of the four AlltoAlls), without the
        run's own keys.

    Raises:
        ValueError: a scheme that does not deduplicate.
    """
    hierarchy = workload.cluster.hierarchy
    slots = workload.first_places.num_slots
    bounds = [MateBound(slots, hierarchy, level) for level in range(1, hierarchy.depth + 1)]
    rows = []
    for iteration in range(workload.measured_from, workload.iterations):
        routing_iteration = workload.schedule[iteration]
        expert_ids_NK = workload.routing.step(routing_iteration).expert_ids_NK
        sets = TokenSets.of(expert_ids_NK, slots).merged()
        least = least_traffic(sets, bounds, workload.schemes, workload.cluster, workload.sizes.sent)
        keys = {
            "iteration": iteration,
            "routing_iteration": routing_iteration,
            "counted": True,
            "layer": workload.layer,
            "pairs": sets.tokens * workload.sizes.topk,
        }
        rows += [
            keys | {"phase": "routing", "stage": name, "dimension": level, "rows": distinct}
            for level, (name, distinct) in enumerate(zip(hierarchy.names, least.rows, strict=True), start=1)
        ]
        time_ms = ALLTOALLS_PER_STEP * least.alltoall_ms
        step = {"phase": "step", "stage": "all", "dimension": least.scheme.dimension, "predicted_ms": time_ms}
        rows.append(keys | step | {"moved_experts": 0})
        progress(iteration)
    return pd.DataFrame(rows)
