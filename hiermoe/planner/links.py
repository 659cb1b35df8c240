"""What the links between groups carry in a stage: no exchange is faster than its busiest link."""

import torch
from torch import Tensor

from hiermoe.topology.cluster import Cluster


def busiest_link_bytes(rows_SGG: Tensor, lanes: int, row_bytes: float) -> Tensor:
    """Bytes over the busiest link of a group, in or out, both ways being links of their own.

    Args:
        rows_SGG: int64 [stage, source, destination].
        lanes: GPUs of a group.
        row_bytes: in the AlltoAll.

    Returns:
        int64 [stage].
    """
    stages, ranks = rows_SGG.shape[:2]
    groups = ranks // lanes
    between_SUU = rows_SGG.view(stages, groups, lanes, groups, lanes).sum((2, 4))
    between_SUU = between_SUU * ~torch.eye(groups, dtype=torch.bool)
    return row_bytes * torch.maximum(between_SUU.sum(2), between_SUU.sum(1)).amax(1)


def link_ms(rows_SGG: Tensor, cluster: Cluster, row_bytes: float) -> list[float]:
    """Least time of every stage on links of a known rate: of the levels that an emulated network shapes.

    Args:
        rows_SGG: int64 [stage, source, destination].
        cluster: hierarchy and rates.
        row_bytes: in the AlltoAll.

    Returns:
        ms of each stage, NaN where no link has a rate.
    """
    if not cluster.shaped_rates:
        return [float("nan")] * len(rows_SGG)
    per_level = [
        busiest_link_bytes(rows_SGG, cluster.hierarchy.lanes(level), row_bytes) / (rate * 1e3 / 8)  # Mbit/s: bytes a ms
        for level, rate in enumerate(cluster.shaped_rates, start=1)
    ]
    return torch.stack(per_level).amax(0).tolist()
