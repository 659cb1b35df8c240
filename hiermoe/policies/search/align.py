"""The same placement under other names of its groups: the one that moves the fewest experts."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from hiermoe.routing.step import experts_per_rank
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement


def aligned(target: Placement, present: Placement, hierarchy: Hierarchy) -> Placement:
    """Rename the target's groups so that as many experts as possible are on their GPU already.

    Groups of a level within one group of the level above are equal to the cost model, so they may exchange names. From
    the innermost level out, the best renaming inside every pair of groups (one of the target, one of the present) is a
    linear assignment of their sub-groups; this is exact.

    Args:
        target: where experts should sit.
        present: where they sit.
        hierarchy: groups of GPUs.

    Returns:
        A placement of the same cost; an expert that keeps its GPU keeps its slot.
    """
    ranks, experts = hierarchy.num_ranks, target.num_experts
    per_rank = experts_per_rank(experts, ranks)
    overlap = np.zeros((ranks, ranks), dtype=np.int64)  # [target group, present group] of the level at hand
    np.add.at(overlap, (target.rank_of(ranks).numpy(), present.rank_of(ranks).numpy()), 1)
    chosen: list[np.ndarray] = []  # by level, innermost first: [target group, present group, child] -> child
    for level in range(hierarchy.depth, 0, -1):
        outer = hierarchy.U[level - 1]
        children = hierarchy.U[level] // outer
        blocks = overlap.reshape(outer, children, outer, children)
        overlap = np.zeros((outer, outer), dtype=np.int64)
        match = np.zeros((outer, outer, children), dtype=np.int64)
        for a in range(outer):
            for b in range(outer):
                rows, columns = linear_sum_assignment(blocks[a, :, b], maximize=True)
                overlap[a, b], match[a, b] = blocks[a, rows, b, columns].sum(), columns
        chosen.append(match)
    named = np.zeros(1, dtype=np.int64)  # present name of each target group
    for match in reversed(chosen):
        children = match.shape[2]
        named = (named[:, None] * children + match[np.arange(len(named)), named]).ravel()
    return on_ranks(torch.from_numpy(named)[target.rank_of(ranks)], present, per_rank)


def on_ranks(rank_E: torch.Tensor, present: Placement, per_rank: int) -> Placement:
    """Slots for experts whose GPUs are known: who stays on its GPU keeps its slot, newcomers take the others in order.

    Args:
        rank_E: int64 [E], GPU of each expert, ``per_rank`` of them on each.
        present: slots now.
        per_rank: E / G.
    """
    stays = present.slot_E // per_rank == rank_E
    slot_E = torch.where(stays, present.slot_E, -1)
    free = torch.ones(len(rank_E), dtype=torch.bool)
    free[present.slot_E[stays]] = False
    moving = (~stays).nonzero().flatten()
    newcomers = moving[torch.argsort(rank_E[moving], stable=True)]
    slot_E[newcomers] = free.nonzero().flatten()  # both by GPU, as many free slots on each as newcomers
    return Placement.of_slots(slot_E)
