"""The same placement under other names of its groups: the one that moves the fewest experts."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

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
    ranks = hierarchy.num_ranks
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
    return present.on_ranks(torch.from_numpy(named)[target.rank_of(ranks)], ranks)
