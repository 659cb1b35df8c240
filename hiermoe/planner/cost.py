"""The paper's cost model: time of a scheme from its traffic, and Algorithm 1."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hiermoe.planner.counts import RoutingCounts
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.planner.traffic import Traffic, exact_traffic
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import Amount

ALLTOALLS_PER_STEP = 4  # dispatch and combine, forward and backward (paper, Sec. I)


def times_of_stages(scheme: DispatchScheme, stage_bytes: Iterable[Amount], cluster: Cluster) -> tuple[Amount, ...]:
    """Time of every stage (paper, Sec. III-B), in ms.

    Args:
        scheme: whose stages.
        stage_bytes: at the busiest GPU of each stage.
        cluster: alpha and beta.
    """
    exchanges = (cluster.constants(stage.peers) for stage in scheme.stages)
    return tuple(constants.ms(amount) for constants, amount in zip(exchanges, stage_bytes, strict=True))


def time_of_alltoall(stage_ms: Iterable[Amount]) -> Amount:
    """t_d of stages that follow one another: their sum."""
    return sum(stage_ms)  # type: ignore[return-value] - of at least one stage


def time_by_groups(
    scheme: DispatchScheme, busiest: Callable[[int], Amount], cluster: Cluster, row_bytes: float
) -> Amount:
    """Time of one AlltoAll, in ms, where the GPUs of the busiest group of each stage share its tokens evenly.

    Args:
        scheme: HDd.
        busiest: tokens that the busiest group of a level needs.
        cluster: hierarchy, alpha and beta.
        row_bytes: M * v.

    Raises:
        ValueError: the scheme does not deduplicate.
    """
    if not scheme.deduplicates:
        raise ValueError(f"group counts price deduplicated traffic; scheme {scheme.name} sends token-expert pairs")
    hierarchy = cluster.hierarchy
    levels = [(stage, stage.level(hierarchy)) for stage in scheme.stages]
    return time_of_alltoall(
        cluster.constants(stage.peers).ms(busiest(level), row_bytes / hierarchy.lanes(level)) for stage, level in levels
    )


def cheapest(times: Sequence[float]) -> int:
    """Position of the smallest time, the first one on ties."""
    return min(range(len(times)), key=times.__getitem__)


@dataclass(frozen=True)
class Price:
    """Modelled time of one AlltoAll (dispatch; combine costs the same, its senders are dispatch's receivers).

    Attributes:
        scheme: what was priced.
        traffic: its rows.
        stage_bytes: bytes at the busiest GPU of each stage.
        stage_ms: alpha + n * beta of each stage (paper, Sec. III-B).
    """

    scheme: DispatchScheme
    traffic: Traffic
    stage_bytes: tuple[int, ...]
    stage_ms: tuple[float, ...]

    @property
    def alltoall_ms(self) -> float:
        """t_d, the sum over the stages."""
        return time_of_alltoall(self.stage_ms)


def price(scheme: DispatchScheme, counts: RoutingCounts, cluster: Cluster, row_bytes: int) -> Price:
    """Modelled time of one AlltoAll of a scheme.

    n is what the busiest GPU of the stage receives, its own share included, over all communicators of the stage; with
    evenly spread senders that is the paper's product of group size and largest send count.

    Args:
        scheme: how tokens move.
        counts: one step under one placement.
        cluster: alpha and beta of every stage.
        row_bytes: M * v.
    """
    traffic = exact_traffic(scheme, counts, cluster.hierarchy)
    stage_bytes = tuple(rows * row_bytes for rows in traffic.busiest_rows().tolist())
    return Price(scheme, traffic, stage_bytes, times_of_stages(scheme, stage_bytes, cluster))


def choose_scheme(
    candidates: Sequence[DispatchScheme], counts: RoutingCounts, cluster: Cluster, row_bytes: int
) -> Price:
    """Algorithm 1: price every candidate on the step's own routing and take the cheapest, the first one on ties.

    With HD1 ... HDD as candidates the result's dimension is the paper's d*.
    """
    prices = [price(scheme, counts, cluster, row_bytes) for scheme in candidates]
    return prices[cheapest([one.alltoall_ms for one in prices])]
