"""How little traffic there can be."""

import math

from hiermoe.planner.counts import RoutingCounts
from hiermoe.topology.hierarchy import Hierarchy


def fixed_placement_rows(counts: RoutingCounts, level: int) -> int:
    """Rows that must enter the groups of a level under this placement: distinct (token, group) pairs.

    A token that stays in its own group counts too. HD2's Inter-level-1 reaches the bound of level 1.
    """
    return int(counts.tokens[level - 1].sum())


def any_placement_rows(num_tokens: int, topk: int, num_experts: int, hierarchy: Hierarchy, level: int) -> int:
    """Rows of a level under the best imaginable placement: ceil(K * U[level] / E) groups a token.

    Loose: it takes every token's experts to share as few groups as hold K experts.
    """
    return num_tokens * math.ceil(topk * hierarchy.U[level] / num_experts)


def busiest_rows(rows: int, num_ranks: int) -> int:
    """Rows of the busiest GPU, at least, where all GPUs together get so many: an even share, rounded up."""
    return -(-rows // num_ranks)
