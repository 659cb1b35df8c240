"""Walks through a run's routing as training would, one layer, without moving anything."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise

from torch import Tensor

from hiermoe.measure.workload import Workload
from hiermoe.planner.cost import ALLTOALLS_PER_STEP, Price, choose_scheme
from hiermoe.planner.counts import RoutingCounts
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.policies.protocol import PlacementPolicy, PlacementUpdate, Start, StaticPolicy, StepContext
from hiermoe.topology.placement import Placement


@dataclass(frozen=True)
class Visit:
    """One iteration.

    Attributes:
        iteration: of the run.
        placement: in force: of several expert-parallel groups, in the one that takes longest.
        home: where experts are before and after the iteration.
        counts: of the iteration's routing under it; of several expert-parallel groups, of the one that takes longest.
        chosen: its scheme (Algorithm 1) and its price.
        context: what the policy decided with.
        update: what it decided; acts from the next iteration on.
    """

    iteration: int
    placement: Placement
    home: Placement
    counts: RoutingCounts
    chosen: Price
    context: StepContext
    update: PlacementUpdate | None


def start_at(workload: Workload, iteration: int) -> Start:
    """What a run's policy does in the iterations before ``iteration``, found by walking through them."""
    policy, placement = workload.new_policy(), workload.first_places
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
    placement, sizes = workload.first_places, workload.sizes
    # The policy's counts are sums over the groups: Q prices a row at its share of one.
    row_bytes = sizes.sent.shared(workload.routing.ep_groups)
    for iteration, routing_iteration in enumerate(workload.schedule):
        context = StepContext(
            iteration, workload.cluster, workload.schemes[0], row_bytes, sizes.expert_parameters, sizes.num_experts
        )
        acting = _acting(policy, workload, routing_iteration, placement, context)
        slowest, chosen, most_used = _slowest_group(workload, routing_iteration, acting)
        counts = workload.routing.counts(routing_iteration, acting[slowest], workload.cluster.hierarchy, slowest)
        context = replace(context, scheme=most_used)
        update = None
        if policy.decides_after(iteration):
            update = policy.decide(_measured(policy, workload, iteration, placement), placement, context)
        yield Visit(iteration, acting[slowest], placement, counts, chosen, context, update)
        placement = placement if update is None else update.placement


def priced(workload: Workload, routing_iteration: int, placement: Placement, group: int = 0) -> Price:
    """The scheme that an expert-parallel group uses for one iteration of the routing (Algorithm 1), and its price."""
    counts = workload.routing.counts(routing_iteration, placement, workload.cluster.hierarchy, group)
    return choose_scheme(workload.schemes, counts, workload.cluster, workload.sizes.sent)


def realised_gains(workload: Workload, placements: Sequence[Placement], first: int = 0) -> dict[int, float]:
    """Exact gains of all updates of a run, on tokens that the update was not decided from.

    Args:
        workload: what was run.
        placements: in force in every iteration from ``first`` on.
        first: iteration.

    Returns:
        For every iteration that ended with an update, but not the last: ms that the four AlltoAlls of the next step
        take less than they would have taken without it.
    """
    gains = {}
    for iteration, (old, new) in enumerate(pairwise(placements), start=first):
        if old is not new:
            after = workload.schedule[iteration + 1]
            saved_ms = priced(workload, after, old).alltoall_ms - priced(workload, after, new).alltoall_ms
            gains[iteration] = ALLTOALLS_PER_STEP * saved_ms
    return gains


def _acting(
    policy: PlacementPolicy, workload: Workload, routing_iteration: int, home: Placement, context: StepContext
) -> list[Placement]:
    """The placement in force in each group's micro-batch."""
    routing = workload.routing
    if policy.copies is None:
        return [home] * routing.ep_groups
    steps = (routing.step(routing_iteration, group) for group in range(routing.ep_groups))
    return [policy.rebalance(step.pairs_GE, home, context) or home for step in steps]


def _slowest_group(
    workload: Workload, routing_iteration: int, acting: Sequence[Placement]
) -> tuple[int, Price, DispatchScheme]:
    """The group that takes longest, the first on ties, its price, and the scheme that most groups chose."""
    prices = [priced(workload, routing_iteration, placement, group) for group, placement in enumerate(acting)]
    slowest = max(range(len(prices)), key=lambda group: prices[group].alltoall_ms)
    votes = Counter(price.scheme for price in prices)
    return slowest, prices[slowest], max(workload.schemes, key=lambda scheme: votes[scheme])


def _measured(policy: PlacementPolicy, workload: Workload, iteration: int, placement: Placement) -> Tensor | None:
    """What the policy measures, summed over the groups; experts that stay need no tokens."""
    if isinstance(policy, StaticPolicy):
        return None
    summed = None
    for group in range(workload.routing.ep_groups):
        measured = workload.routing.measured(
            policy, iteration, workload.schedule[iteration], placement, workload.cluster.hierarchy, group
        )
        if measured is None:
            return None
        summed = measured if summed is None else summed + measured
    return summed
