"""The paper's cost model: time of a scheme from its traffic, and Algorithm 1."""

from collections.abc import Sequence
from dataclasses import dataclass

from hiermoe.planner.counts import RoutingCounts
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.planner.traffic import Traffic, exact_traffic
from hiermoe.topology.cluster import Cluster

ALLTOALLS_PER_STEP = 4  # dispatch and combine, forward and backward (paper, Sec. I)


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
        return sum(self.stage_ms)


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
    constants = [cluster.constants(stage.peers) for stage in scheme.stages]
    stage_ms = tuple(c.alpha_ms + n * c.beta_ms_per_byte for c, n in zip(constants, stage_bytes, strict=True))
    return Price(scheme, traffic, stage_bytes, stage_ms)


def choose_scheme(
    candidates: Sequence[DispatchScheme], counts: RoutingCounts, cluster: Cluster, row_bytes: int
) -> Price:
    """Algorithm 1: price every candidate on the step's own routing and take the cheapest, the first one on ties.

    With HD1 ... HDD as candidates the result's dimension is the paper's d*.
    """
    prices = [price(scheme, counts, cluster, row_bytes) for scheme in candidates]
    return min(prices, key=lambda p: p.alltoall_ms)
