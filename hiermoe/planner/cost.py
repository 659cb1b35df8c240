"""The paper's cost model: time of a scheme from its traffic, and Algorithm 1."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hiermoe.model import RowBytes
from hiermoe.planner.counts import RoutingCounts
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.planner.traffic import Traffic, exact_traffic
from hiermoe.records.status import NotApplicable
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import Amount

ALLTOALLS_PER_STEP = 4  # dispatch and combine, forward and backward (paper, Sec. I)


def times_of_stages(scheme: DispatchScheme, stage_bytes: Iterable[Amount], cluster: Cluster) -> tuple[Amount, ...]:
    """Time of every stage (paper, Sec. III-B) over all chunks, in ms.

    Args:
        scheme: whose stages.
        stage_bytes: at the busiest GPU of each stage.
        cluster: alpha and beta.
    """
    exchanges = (cluster.constants(stage.peers) for stage in scheme.stages)
    return tuple(
        constants.ms(amount, parts=cluster.starts(scheme.chunks))
        for constants, amount in zip(exchanges, stage_bytes, strict=True)
    )


def time_of_alltoall(scheme: DispatchScheme, stage_ms: Sequence[Amount], cluster: Cluster) -> Amount:
    """t_d of one AlltoAll, in ms.

    In one chunk stages follow one another: the sum of their times (paper, Sec. III-B). In several, beyond the paper,
    see :func:`time_in_chunks`.

    Args:
        scheme: whose stages.
        stage_ms: of each, over all chunks: numbers, or tensors or arrays of them.
        cluster: says how far stages overlap.

    Raises:
        NotApplicable: several chunks, and the cluster does not say.
    """
    total: Amount = sum(stage_ms)  # type: ignore[assignment] - of at least one stage
    if scheme.chunks == 1:
        return total
    overlap, least_ms = check_overlap(scheme, cluster), least_of_waves(scheme.chunks, len(stage_ms), cluster.wave_ms)
    return time_in_chunks(total, reduce(_larger, stage_ms), scheme.chunks, overlap, least_ms)


def time_in_chunks(total: Any, longest: Any, chunks: Any, overlap: float, least: Any = 0.0) -> Any:
    """Time of stages that C chunks pass one after the other.

    The longest stage is never idle, and of every other one a C-th part is seen alone, before it or after it (fill and
    drain); of the rest as much passes beside the longest as stages overlap. Below what their waves take at least they
    do not fall; both meet as in a hypotenuse, since of many waves some are long by bytes and some by their start.

    Args:
        total: of all stages together: a number, or a tensor, array or column of them, as the others.
        longest: of the longest of them.
        chunks: C.
        overlap: 0 to 1.
        least: of all waves.
    """
    passed = total - (total - longest) * (overlap * (chunks - 1) / chunks)
    if isinstance(least, float | int) and least == 0:
        return passed
    return (passed**2 + least**2) ** 0.5


def least_of_waves(chunks: Any, stages: Any, wave_ms: float | None) -> Any:
    """What the waves of several chunks take at least, in ms; one chunk has none."""
    return (chunks > 1) * (chunks + stages - 1) * (wave_ms or 0.0)


def check_overlap(scheme: DispatchScheme, cluster: Cluster) -> float:
    """How far a scheme's stages overlap on a cluster; 0 for one chunk.

    Raises:
        NotApplicable: several chunks, and the cluster does not say.
    """
    if scheme.chunks == 1:
        return 0.0
    if cluster.overlap is None:
        raise NotApplicable(
            f"it sends in several chunks, and cluster {cluster.name} does not say how far its stages overlap "
            "(+cluster.overlap=1 says wholly; `hiermoe calibrate` measures it)"
        )
    return cluster.overlap


def _larger(a: Amount, b: Amount) -> Amount:
    if isinstance(a, Tensor):
        return torch.maximum(a, torch.as_tensor(b))
    return np.maximum(a, b) if isinstance(a, np.ndarray) else max(a, b)


def time_by_groups(
    scheme: DispatchScheme, busiest: Callable[[int], Amount], cluster: Cluster, row_bytes: RowBytes
) -> Amount:
    """Time of one AlltoAll, in ms, where the GPUs of the busiest group of each stage share its tokens evenly.

    Of the four of a step, whose rows may differ, the mean.

    Args:
        scheme: HDd.
        busiest: tokens that the busiest group of a level needs.
        cluster: hierarchy, alpha and beta.
        row_bytes: in each AlltoAll.

    Raises:
        ValueError: the scheme does not deduplicate.
    """
    if not scheme.deduplicates:
        raise ValueError(f"group counts price deduplicated traffic; scheme {scheme.name} sends token-expert pairs")
    hierarchy = cluster.hierarchy
    levels = [(stage, stage.level(hierarchy)) for stage in scheme.stages]
    busiest_of = [busiest(level) for _, level in levels]

    def alltoall_ms(row_bytes: float) -> Amount:
        stage_ms = [
            cluster.constants(stage.peers).ms(amount, row_bytes / hierarchy.lanes(level), cluster.starts(scheme.chunks))
            for (stage, level), amount in zip(levels, busiest_of, strict=True)
        ]
        return time_of_alltoall(scheme, stage_ms, cluster)

    return row_bytes.averaged(alltoall_ms)


def cheapest(times: Sequence[float]) -> int:
    """Position of the smallest time, the first one on ties."""
    return min(range(len(times)), key=times.__getitem__)


@dataclass(frozen=True)
class AlltoAllPrice:
    """Modelled time of one of a step's AlltoAlls.

    Attributes:
        row_bytes: of its rows.
        stage_bytes: bytes at the busiest GPU of each stage.
        stage_ms: alpha + n * beta of each stage (paper, Sec. III-B), over all chunks.
        alltoall_ms: t_d.
    """

    row_bytes: float
    stage_bytes: tuple[float, ...]
    stage_ms: tuple[float, ...]
    alltoall_ms: float


@dataclass(frozen=True)
class Price:
    """Modelled time of a step's AlltoAlls; combine sends dispatch's rows back, its senders are dispatch's receivers.

    Attributes:
        scheme: what was priced.
        traffic: its rows.
        calls: each AlltoAll of a step, by name.
        alltoall_ms: t_d, mean of them.
    """

    scheme: DispatchScheme
    traffic: Traffic
    calls: Mapping[str, AlltoAllPrice]
    alltoall_ms: float


def price(scheme: DispatchScheme, counts: RoutingCounts, cluster: Cluster, row_bytes: RowBytes) -> Price:
    """Modelled time of the AlltoAlls of a scheme.

    n is what the busiest GPU of the stage receives, its own share included, over all communicators of the stage; with
    evenly spread senders that is the paper's product of group size and largest send count.

    Args:
        scheme: how tokens move.
        counts: one step under one placement.
        cluster: alpha and beta of every stage.
        row_bytes: in each AlltoAll.
    """
    traffic = exact_traffic(scheme, counts, cluster.hierarchy)
    busiest = traffic.busiest_rows().tolist()

    def of_size(size: float) -> AlltoAllPrice:
        stage_bytes = tuple(rows * size for rows in busiest)
        stage_ms = times_of_stages(scheme, stage_bytes, cluster)
        return AlltoAllPrice(size, stage_bytes, stage_ms, time_of_alltoall(scheme, stage_ms, cluster))

    by_call = row_bytes.by_call
    of = {size: of_size(size) for size in dict.fromkeys(by_call.values())}
    calls = {call: of[size] for call, size in by_call.items()}
    return Price(scheme, traffic, calls, row_bytes.averaged(lambda size: of[size].alltoall_ms))


def choose_scheme(
    candidates: Sequence[DispatchScheme], counts: RoutingCounts, cluster: Cluster, row_bytes: RowBytes
) -> Price:
    """Algorithm 1: price every candidate on the step's own routing and take the cheapest, the first one on ties.

    A step's plan is one for all its AlltoAlls, so that their sum decides. With HD1 ... HDD as candidates the result's
    dimension is the paper's d*; with each in several numbers of chunks, C is chosen with it.
    """
    prices = [price(scheme, counts, cluster, row_bytes) for scheme in candidates]
    return prices[cheapest([one.alltoall_ms for one in prices])]
