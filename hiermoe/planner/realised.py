"""What a placement update really saved: the next step's own tokens, priced under the old and the new placement."""

from collections.abc import Callable, Sequence

from hiermoe.planner.cost import ALLTOALLS_PER_STEP, choose_scheme
from hiermoe.planner.counts import RoutingCounts
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.placement import Placement


def realised_gains(
    placements: Sequence[Placement],
    count: Callable[[int, Placement], RoutingCounts],
    schemes: Sequence[DispatchScheme],
    cluster: Cluster,
    row_bytes: int,
) -> dict[int, float]:
    """Exact gains of all updates of a run, on tokens that the update was not decided from.

    Args:
        placements: in force in every iteration.
        count: the counts of an iteration's routing under a placement.
        schemes: candidates; the cheapest is used under either placement.
        cluster: hierarchy, alpha and beta.
        row_bytes: M * v.

    Returns:
        For every iteration that ended with an update, but not the last: ms that the four AlltoAlls of the next step
        take less than they would have taken without it.
    """
    gains = {}
    for iteration in range(len(placements) - 1):
        old, new = placements[iteration], placements[iteration + 1]
        if old is new:
            continue
        before, after = (
            choose_scheme(schemes, count(iteration + 1, placement), cluster, row_bytes).alltoall_ms
            for placement in (old, new)
        )
        gains[iteration] = ALLTOALLS_PER_STEP * (before - after)
    return gains
