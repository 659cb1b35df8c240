"""From one placement towards another, a few experts at a time, the most useful first."""

import torch

from hiermoe.planner.maxima import MaxFunction
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.policies.search.descent import SwapTable
from hiermoe.topology.placement import Placement


def approach(
    table: SwapTable,
    target: Placement,
    max_moved: int,
    scheme: DispatchScheme,
    row_bytes: int,
    max_function: MaxFunction,
) -> Placement:
    """Exchange experts in pairs, each time the pair after which the modelled time is smallest.

    A pair counts if it brings an expert to its GPU of the target and moves no expert that is there already. Experts are
    equally large and every pair moves two, so the smallest time is the largest gain per byte. A pair may cost time: on
    the way to a better placement some do.

    Args:
        table: under the placement to start from; left at the result.
        target: where experts should sit; named as :func:`hiermoe.policies.search.align.aligned` does.
        max_moved: experts that may move, at least 2.
        scheme: HDd, priced by Q.
        row_bytes: M * v.
        max_function: of Q.

    Returns:
        A placement that is closer to the target, or has the target's GPUs.
    """
    ranks = table.cluster.hierarchy.num_ranks
    wanted_E = target.rank_of(ranks)
    for _ in range(max_moved // 2):
        rank_E, expert_at = table.placement.rank_of(ranks), table.placement.expert_at_S
        if torch.equal(rank_E, wanted_E):
            break
        times = table.times(scheme, row_bytes, max_function)
        r_P, c_P = (expert_at[slots] for slots in times.slots_2P)  # experts of every pair
        away_E = rank_E != wanted_E
        arrives = (wanted_E[r_P] == rank_E[c_P]) | (wanted_E[c_P] == rank_E[r_P])
        useful = arrives & away_E[r_P] & away_E[c_P]
        best = int(times.after_ms_P.masked_fill(~useful, float("inf")).argmin())
        table.swap(*times.slots_2P[:, best].tolist())
    return table.placement
