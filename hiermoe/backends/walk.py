"""Walks through a run's routing as training would, one layer, without moving anything."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from hiermoe.backends.workload import Workload
from hiermoe.planner.cost import Price, choose_scheme
from hiermoe.planner.counts import RoutingCounts
from hiermoe.planner.policy import PlacementPolicy, PlacementUpdate, Start, StepContext
from hiermoe.routing.step import iteration_schedule
from hiermoe.topology.placement import Placement


@dataclass(frozen=True)
class Visit:
    """One iteration.

    Attributes:
        iteration: of the run.
        placement: in force.
        counts: of the iteration's routing under it.
        chosen: the scheme (Algorithm 1) and its price.
        context: what the policy decided with.
        update: what it decided; acts from the next iteration on.
    """

    iteration: int
    placement: Placement
    counts: RoutingCounts
    chosen: Price
    context: StepContext
    update: PlacementUpdate | None


def start_at(workload: Workload, iteration: int) -> Start:
    """What a run's policy does in the iterations before ``iteration``, found by walking through them."""
    policy, placement = workload.new_policy(), Placement.identity(workload.num_experts)
    for visit in islice(walk(workload, policy), iteration):
        if visit.update is not None:
            placement = visit.update.placement
    return Start(iteration, placement, policy.state_dict())


def walk(workload: Workload, policy: PlacementPolicy) -> Iterator[Visit]:
    """All iterations of a run, in order.

    Args:
        workload: what to run.
        policy: of the layer; measures and decides in every iteration.
    """
    placement = Placement.identity(workload.num_experts)
    cluster, routing = workload.cluster, workload.routing
    schedule = iteration_schedule(workload.iterations, routing.num_distinct)
    for iteration, routing_iteration in enumerate(schedule):
        counts = routing.counts(routing_iteration, placement, cluster.hierarchy)
        chosen = choose_scheme(workload.schemes, counts, cluster, workload.row_bytes)
        context = StepContext(iteration, cluster, chosen.scheme, workload.row_bytes, workload.expert_parameters)
        step = routing.step(routing_iteration)
        measurement = policy.measure(step.expert_ids_NK, placement, cluster.hierarchy, iteration)
        update = policy.decide(measurement, placement, context)
        yield Visit(iteration, placement, counts, chosen, context, update)
        placement = placement if update is None else update.placement
