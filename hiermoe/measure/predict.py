"""No network: walk through the routing as training would, count the exact traffic of every step, and price it."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from hiermoe.measure.walk import Visit, realised_gains, walk
from hiermoe.measure.workload import Workload
from hiermoe.planner.bounds import fixed_placement_rows
from hiermoe.planner.cost import ALLTOALLS_PER_STEP, AlltoAllPrice, Price, time_by_groups
from hiermoe.planner.counts import RoutingCounts
from hiermoe.planner.links import link_ms
from hiermoe.policies.price_of_copies import price_copies
from hiermoe.policies.price_of_moving import STATE_BYTES_PER_PARAMETER, price_migration
from hiermoe.policies.protocol import CopyTerms, PlacementUpdate, StepContext
from hiermoe.ranks.world import Progress, no_progress
from hiermoe.topology.placement import Placement

Row = dict[str, Any]


def simulate(workload: Workload, progress: Progress = no_progress) -> pd.DataFrame:
    """Walk through all iterations of one layer.

    Each iteration: choose the scheme on the step's own routing (Algorithm 1), price its four AlltoAlls, let the
    placement policy measure and decide; what it decides acts from the next iteration on.

    Where there are several expert-parallel groups, each chooses for itself, and rows tell of the one that takes
    longest: the step waits for it. They share one placement, decided from the tokens of all.

    Args:
        workload: what to run.
        progress: called with the number of every finished iteration.

    Returns:
        Rows of the phases dispatch, routing and step, without the run's own keys.
    """
    rows: list[Row] = []
    placements: list[Placement] = []
    policy = workload.new_policy()
    terms = policy.copies
    for visit in walk(workload, policy):
        iteration, placement, update = visit.iteration, visit.home, visit.update
        placements.append(placement)
        keys = {
            "iteration": iteration,
            "routing_iteration": workload.schedule[iteration],
            "counted": iteration >= workload.measured_from,
            "layer": workload.layer,
        }
        rows += [keys | row for row in _dispatch_rows(visit.chosen, visit.counts, workload)]
        rows += [keys | row for row in _routing_rows(visit.counts, workload)]
        step = _step_row(visit.chosen, visit.counts) | _update_columns(update, placement, terms, workload)
        rows.append(keys | step | _copy_columns(visit, terms, workload))
        if (
            update is not None
            and update.modelled_gain_ms is not None
            and len(placement.changed_slots(update.placement)) > 2  # several swaps: modelled from a bound
            and workload.routing.ep_groups == 1
        ):
            after = workload.routing.counts(workload.schedule[iteration], update.placement, workload.cluster.hierarchy)
            saved_ms = _q_ms(visit.counts, visit.context) - _q_ms(after, visit.context)
            rows[-1]["recounted_gain_ms"] = ALLTOALLS_PER_STEP * saved_ms
        progress(iteration)
    if workload.routing.ep_groups > 1:
        return pd.DataFrame(rows)  # what an update saved is not recounted group by group
    gains = realised_gains(workload, placements)
    for row in rows:
        if row["phase"] == "step" and row["iteration"] in gains:
            row["realised_gain_ms"] = gains[row["iteration"]]
    return pd.DataFrame(rows)


def _dispatch_rows(chosen: Price, counts: RoutingCounts, workload: Workload) -> Iterator[Row]:
    """One row per stage of dispatch, and of every other AlltoAll whose rows have not as many bytes as dispatch's."""
    for phase, call in chosen.calls.items():
        if phase == "dispatch" or call.row_bytes != chosen.calls["dispatch"].row_bytes:
            yield from ({"phase": phase} | row for row in _stage_rows(chosen, call, counts, workload))


def _stage_rows(chosen: Price, call: AlltoAllPrice, counts: RoutingCounts, workload: Workload) -> Iterator[Row]:
    """One row per stage of one AlltoAll."""
    cluster, hierarchy = workload.cluster, workload.cluster.hierarchy
    links = link_ms(chosen.traffic.rows_SGG, cluster, call.row_bytes)
    crossing = chosen.traffic.crossing_rows().tolist()
    busiest = chosen.traffic.busiest_rows().tolist()
    for index, (name, stage) in enumerate(zip(chosen.scheme.stage_names, chosen.scheme.stages, strict=True)):
        level, group_rows = stage.level(hierarchy), float("nan")
        if stage.rows == "token":  # of the busiest group, by its GPUs, as Q counts them
            group_rows = int(counts.needed(level).max()) / hierarchy.lanes(level)
        yield {
            "stage": name,
            "dimension": chosen.scheme.dimension,
            "chunks": chosen.scheme.chunks,
            "predicted_ms": call.stage_ms[index],
            "link_ms": links[index],
            "rows": busiest[index],
            "group_rows": group_rows,
            "bytes": call.stage_bytes[index],
            "crossing_rows": crossing[index],
        }


def _routing_rows(counts: RoutingCounts, workload: Workload) -> Iterator[Row]:
    """One row per level: distinct (token, group) pairs under the present placement."""
    pairs = int(counts.pairs_GS.sum())
    for level, name in enumerate(workload.cluster.hierarchy.names, start=1):
        distinct = fixed_placement_rows(counts, level)
        yield {"phase": "routing", "stage": name, "dimension": level, "rows": distinct, "pairs": pairs}


def _step_row(chosen: Price, counts: RoutingCounts) -> Row:
    """The iteration as a whole."""
    expert_rows_G = counts.pairs_GG.sum(0)
    return {
        "phase": "step",
        "stage": "all",
        "dimension": chosen.scheme.dimension,
        "chunks": chosen.scheme.chunks,
        "predicted_ms": ALLTOALLS_PER_STEP * chosen.alltoall_ms,
        "pairs": chosen.traffic.total_pairs,
        "dropped_pairs": chosen.traffic.dropped_pairs,
        "expert_rows_max": int(expert_rows_G.max()),
        "expert_rows_mean": float(expert_rows_G.double().mean()),
    }


def _q_ms(counts: RoutingCounts, context: StepContext) -> float:
    """Time of one AlltoAll as Q models it, with the plain maximum, from the counts of all tokens."""
    return time_by_groups(
        context.scheme, lambda level: int(counts.needed(level).max()), context.cluster, context.row_bytes
    )


def _update_columns(
    update: PlacementUpdate | None, placement: Placement, terms: CopyTerms | None, workload: Workload
) -> Row:
    """What the policy did after the iteration."""
    if update is None:
        return {"moved_experts": 0, "migration_bytes": 0, "migration_link_ms": 0.0, "migration_alltoall_ms": 0.0}
    # Sharded state has no place that a layout could change.
    sharded = terms is not None and terms.sharded
    expert_bytes = 0 if sharded else STATE_BYTES_PER_PARAMETER * workload.sizes.expert_parameters
    migration = price_migration(placement, update.placement, workload.cluster, expert_bytes, workload.sizes.num_experts)
    return {
        "moved_experts": migration.moved_experts,
        "moves": placement.moves_to(update.placement),
        "migration_bytes": migration.moved_bytes,
        "migration_link_ms": migration.link_ms,
        "migration_alltoall_ms": migration.alltoall_ms,
        "modelled_gain_ms": float("nan") if update.modelled_gain_ms is None else update.modelled_gain_ms,
    }


def _copy_columns(visit: Visit, terms: CopyTerms | None, workload: Workload) -> Row:
    """What copies of experts took in the iteration, and AlltoAlls with it."""
    alltoalls_ms = ALLTOALLS_PER_STEP * visit.chosen.alltoall_ms
    if terms is None:
        nothing = ("bytes", "link_ms", "alltoall_ms")
        kinds = {f"{kind}_{what}": 0.0 for kind in ("copies", "gradient") for what in nothing}
        return {**kinds, "slots_gb": 0.0, "net_ms": alltoalls_ms}
    cost = price_copies(visit.placement, visit.home, workload.cluster, terms, workload.sizes)
    return {
        "copies_bytes": cost.weights.moved_bytes,
        "copies_link_ms": cost.weights.link_ms,
        "copies_alltoall_ms": cost.weights.alltoall_ms,
        "gradient_bytes": cost.gradients.moved_bytes,
        "gradient_link_ms": cost.gradients.link_ms,
        "gradient_alltoall_ms": cost.gradients.alltoall_ms,
        "slots_gb": cost.slots_gb,
        "net_ms": alltoalls_ms + cost.weights.link_ms + cost.gradients.link_ms,
    }
