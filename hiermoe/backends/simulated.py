"""No network: walk through the routing as training would, count the exact traffic of every step, and price it."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
from torch import Tensor

from hiermoe.backends.workload import Workload
from hiermoe.planner.bounds import fixed_placement_rows
from hiermoe.planner.cost import ALLTOALLS_PER_STEP, Price, choose_scheme
from hiermoe.planner.counts import RoutingCounts
from hiermoe.planner.links import link_ms
from hiermoe.planner.migration import STATE_BYTES_PER_PARAMETER, price_migration
from hiermoe.planner.policy import PlacementPolicy, PlacementUpdate, StaticPolicy, StepContext
from hiermoe.planner.realised import realised_gains
from hiermoe.planner.scheme import DispatchScheme, Stage
from hiermoe.routing.step import first_measured, iteration_schedule
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement

Row = dict[str, Any]


def simulate(workload: Workload, progress: Callable[[int], None] = lambda iteration: None) -> pd.DataFrame:
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
    placement = Placement.identity(workload.num_experts)
    cluster, routing = workload.cluster, workload.routing
    measured_from = first_measured(workload.iterations, routing.num_distinct)
    schedule = iteration_schedule(workload.iterations, routing.num_distinct)
    for iteration, routing_iteration in enumerate(schedule):
        placements.append(placement)
        slowest, chosen, most_used = _priced(workload, routing_iteration, placement)
        counts = routing.counts(routing_iteration, placement, cluster.hierarchy, slowest)
        context = _context(workload, iteration, most_used)
        update = policy.decide(_measured(policy, workload, iteration, routing_iteration, placement), placement, context)
        keys = {
            "iteration": iteration,
            "routing_iteration": routing_iteration,
            "measured": iteration >= measured_from,
            "layer": workload.layer,
        }
        rows += [keys | row for row in _dispatch_rows(chosen, counts, workload)]
        rows += [keys | row for row in _routing_rows(counts, workload)]
        rows.append(keys | _step_row(chosen, counts) | _update_columns(update, placement, workload))
        if update is not None:
            several = _exchanges_several(placement, update.placement)
            if update.modelled_gain_ms is not None and several and routing.replicas == 1:
                after = routing.counts(routing_iteration, update.placement, cluster.hierarchy)
                saved_ms = _q_ms(counts, context) - _q_ms(after, context)
                rows[-1]["recounted_gain_ms"] = ALLTOALLS_PER_STEP * saved_ms
            placement = update.placement
        progress(iteration)
    if routing.replicas > 1:
        return pd.DataFrame(rows)  # what an update saved is not recounted group by group
    gains = realised_gains(
        placements,
        lambda iteration, placement: routing.counts(schedule[iteration], placement, cluster.hierarchy),
        workload.schemes,
        cluster,
        workload.row_bytes,
    )
    for row in rows:
        if row["phase"] == "step" and row["iteration"] in gains:
            row["realised_gain_ms"] = gains[row["iteration"]]
    return pd.DataFrame(rows)


def _priced(workload: Workload, routing_iteration: int, placement: Placement) -> tuple[int, Price, DispatchScheme]:
    """The group that takes longest, the first on ties, its price, and the scheme that most groups chose."""
    routing, cluster = workload.routing, workload.cluster
    slowest, longest, votes = 0, None, Counter[DispatchScheme]()
    for replica in range(routing.replicas):
        counts = routing.counts(routing_iteration, placement, cluster.hierarchy, replica)
        chosen = choose_scheme(workload.schemes, counts, cluster, workload.row_bytes)
        votes[chosen.scheme] += 1
        if longest is None or chosen.alltoall_ms > longest.alltoall_ms:
            slowest, longest = replica, chosen
    assert longest is not None
    return slowest, longest, max(workload.schemes, key=lambda scheme: votes[scheme])


def _context(workload: Workload, iteration: int, scheme: DispatchScheme) -> StepContext:
    """What the policy decides with. Its counts are sums over the groups: Q prices a row at its share of one."""
    row_bytes = max(workload.row_bytes // workload.routing.replicas, 1)
    return StepContext(iteration, workload.cluster, scheme, row_bytes, workload.expert_parameters)


def _measured(
    policy: PlacementPolicy, workload: Workload, iteration: int, routing_iteration: int, placement: Placement
) -> Tensor | None:
    """What the policy measures, summed over the groups; experts that stay need no tokens."""
    if isinstance(policy, StaticPolicy):
        return None
    summed = None
    for replica in range(workload.routing.replicas):
        ids_NK = workload.routing.step(routing_iteration, replica).expert_ids_NK
        measured = policy.measure(ids_NK, placement, workload.cluster.hierarchy, iteration)
        if measured is None:
            return None
        summed = measured if summed is None else summed + measured
    return summed


def _dispatch_rows(chosen: Price, counts: RoutingCounts, workload: Workload) -> Iterator[Row]:
    """One row per stage of one AlltoAll."""
    cluster, hierarchy = workload.cluster, workload.cluster.hierarchy
    links = link_ms(chosen.traffic.rows_SGG, cluster, workload.row_bytes)
    crossing = chosen.traffic.crossing_rows().tolist()
    busiest = chosen.traffic.busiest_rows().tolist()
    for index, stage in enumerate(chosen.scheme.stages):
        yield {
            "phase": "dispatch",
            "stage": f"{index + 1}:{stage.peers}",
            "dimension": chosen.scheme.dimension,
            "predicted_ms": chosen.stage_ms[index],
            "link_ms": links[index],
            "rows": busiest[index],
            "group_rows": _group_rows(stage, counts, hierarchy),
            "bytes": chosen.stage_bytes[index],
            "crossing_rows": crossing[index],
        }


def _group_rows(stage: Stage, counts: RoutingCounts, hierarchy: Hierarchy) -> float:
    """Rows of the busiest group divided by its GPUs, as Q counts them; NaN where the stage does not deduplicate."""
    if stage.rows != "token":
        return float("nan")
    level = stage.level(hierarchy)
    return int(counts.tokens[level - 1].sum(0).max()) / hierarchy.lanes(level)


def _routing_rows(counts: RoutingCounts, workload: Workload) -> Iterator[Row]:
    """One row per level: distinct (token, group) pairs under the present placement."""
    pairs = int(counts.pairs_GE.sum())
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
        "predicted_ms": ALLTOALLS_PER_STEP * chosen.alltoall_ms,
        "pairs": chosen.traffic.total_pairs,
        "dropped_pairs": chosen.traffic.dropped_pairs,
        "expert_rows_max": int(expert_rows_G.max()),
        "expert_rows_mean": float(expert_rows_G.double().mean()),
    }


def _exchanges_several(old: Placement, new: Placement) -> bool:
    """More than one swap: what it saves is modelled from a bound (:meth:`SwapStatistics.swapped`)."""
    return int((old.slot_E != new.slot_E).sum()) > 2


def _q_ms(counts: RoutingCounts, context: StepContext) -> float:
    """Time of one AlltoAll as Q models it, with the plain maximum, from the counts of all tokens."""
    total_ms = 0.0
    for stage in context.scheme.stages:
        constants = context.cluster.constants(stage.peers)
        rows = _group_rows(stage, counts, context.cluster.hierarchy)
        total_ms += constants.alpha_ms + constants.beta_ms_per_byte * context.row_bytes * rows
    return total_ms


def _update_columns(update: PlacementUpdate | None, placement: Placement, workload: Workload) -> Row:
    """What the policy did after the iteration."""
    if update is None:
        return {"moved_experts": 0, "migration_bytes": 0, "migration_link_ms": 0.0, "migration_alltoall_ms": 0.0}
    expert_bytes = STATE_BYTES_PER_PARAMETER * workload.expert_parameters
    migration = price_migration(placement, update.placement, workload.cluster, expert_bytes)
    return {
        "moved_experts": migration.moved_experts,
        "moves": placement.moves_to(update.placement),
        "migration_bytes": migration.moved_bytes,
        "migration_link_ms": migration.link_ms,
        "migration_alltoall_ms": migration.alltoall_ms,
        "modelled_gain_ms": float("nan") if update.modelled_gain_ms is None else update.modelled_gain_ms,
    }
