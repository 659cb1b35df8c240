"""Which copy of an expert each source uses where a planner leaves it open, or says no more than how near."""

import torch
from torch import Tensor

from hiermoe.planner.counts import separating_level
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement


def evenly_among_nearest(expert_at_S: Tensor, hierarchy: Hierarchy, level: int | None = None) -> Placement:
    """Every source splits its tokens evenly among the nearest copies.

    Args:
        expert_at_S: int64 [S], expert in each slot.
        hierarchy: groups of GPUs.
        level: near is in the same group of this level, and all others are equally far; None: as near as there is one
            in the hierarchy.
    """
    ranks, experts = hierarchy.num_ranks, int(expert_at_S.max()) + 1
    rank_S = torch.arange(len(expert_at_S)) // (len(expert_at_S) // ranks)
    near_GS = separating_level(hierarchy)[:, rank_S]  # the larger, the nearer
    if level is not None:
        near_GS = (near_GS > level).long()
    index_GS = expert_at_S.expand(ranks, -1)
    nearest_GE = torch.zeros(ranks, experts, dtype=torch.int64).scatter_reduce(1, index_GS, near_GS, "amax")
    quota_GS = (near_GS == nearest_GE[:, expert_at_S]).long()
    slot_GS = torch.arange(len(expert_at_S)).expand(ranks, -1).masked_fill(quota_GS == 0, len(expert_at_S))
    copy_GE = torch.full((ranks, experts), len(expert_at_S)).scatter_reduce(1, index_GS, slot_GS, "amin")
    return Placement(expert_at_S, copy_GE, quota_GS)
