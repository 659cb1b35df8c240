"""Walks through a run's routing as training would, one layer, without moving anything."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from hiermoe.measure.workload import Workload
from hiermoe.planner.cost import Price, choose_scheme
from hiermoe.planner.counts import RoutingCounts
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.policies.protocol import PlacementPolicy, PlacementUpdate, Start, StaticPolicy, StepContext
from hiermoe.routing.step import iteration_schedule
from hiermoe.topology.placement import Placement


@dataclass(frozen=True)
class Visit:
    """One iteration.

    Attributes:
        iteration: of the run.
        placement: in force.
        counts: of the iteration's routing under it; of several expert-parallel groups, of the one that takes longest.
        chosen: its scheme (Algorithm 1) and its price.
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
    policy, placement = workload.new_policy(), Placement.identity(workload.sizes.num_experts)
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
    placement = Placement.identity(workload.sizes.num_experts)
    cluster, routing = workload.cluster, workload.routing
    schedule = iteration_schedule(workload.iterations, routing.num_distinct)
    for iteration, routing_iteration in enumerate(schedule):
        slowest, chosen, most_used = _priced(workload, routing_iteration, placement)
        counts = routing.counts(routing_iteration, placement, cluster.hierarchy, slowest)
        context = _context(workload, iteration, most_used)
        update = policy.decide(_measured(policy, workload, iteration, routing_iteration, placement), placement, context)
        yield Visit(iteration, placement, counts, chosen, context, update)
        placement = placement if update is None else update.placement


def _priced(workload: Workload, routing_iteration: int, placement: Placement) -> tuple[int, Price, DispatchScheme]:
    """The group that takes longest, the first on ties, its price, and the scheme that most groups chose."""
    routing, cluster = workload.routing, workload.cluster
    slowest, longest, votes = 0, None, Counter[DispatchScheme]()
    for group in range(routing.ep_groups):
        counts = routing.counts(routing_iteration, placement, cluster.hierarchy, group)
        chosen = choose_scheme(workload.schemes, counts, cluster, workload.sizes.row_bytes)
        votes[chosen.scheme] += 1
        if longest is None or chosen.alltoall_ms > longest.alltoall_ms:
            slowest, longest = group, chosen
    assert longest is not None
    return slowest, longest, max(workload.schemes, key=lambda scheme: votes[scheme])


def _context(workload: Workload, iteration: int, scheme: DispatchScheme) -> StepContext:
    """What the policy decides with. Its counts are sums over the groups: Q prices a row at its share of one."""
    row_bytes = max(workload.sizes.row_bytes // workload.routing.ep_groups, 1)
    return StepContext(iteration, workload.cluster, scheme, row_bytes, workload.sizes.expert_parameters)


def _measured(
    policy: PlacementPolicy, workload: Workload, iteration: int, routing_iteration: int, placement: Placement
) -> Tensor | None:
    """What the policy measures, summed over the groups; experts that stay need no tokens."""
    if isinstance(policy, StaticPolicy):
        return None
    summed = None
    for group in range(workload.routing.ep_groups):
        step = workload.routing.step(routing_iteration, group)
        measured = policy.measure(step.expert_ids_NK, step.source_N, placement, workload.cluster.hierarchy, iteration)
        if measured is None:
            return None
        summed = measured if summed is None else summed + measured
    return summed
