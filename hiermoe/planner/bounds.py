"""How little traffic there can be, and so how little time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hiermoe.model import RowBytes
from hiermoe.planner.cost import cheapest, time_of_alltoall, times_of_stages
from hiermoe.planner.counts import RoutingCounts
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.planner.token_sets import TokenSets
from hiermoe.routing.step import experts_per_rank
from hiermoe.topology.cluster import Cluster
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


class MateBound:
    """Rows of a level under any placement at all, bounded from below by what tokens select together.

    Let S(e) be the expert e's mates: the m - 1 others in its group of m = E / U[level]. A token with K experts in j
    groups is in j = sum over its experts e of 1 / (1 + x_e) groups, x_e the number of its other experts among S(e),
    since each group of k experts adds k times 1 / k. Summed over tokens, the rows of a level are

        R = sum over e of F_e(S(e)),    F_e(S) = sum over tokens n that select e of phi(|n and S|),

    with phi(x) = 1 / (1 + x). Let every expert choose its own m - 1 mates, whether or not they choose it, and fractions
    of mates too: y_e in [0, 1]^E, y_ee = 0, summing to m - 1. Every placement is such a choice, so R is at least the
    sum of the minima of F_e over these y. phi is replaced by its chords between integers: the same where x is one,
    which is all that placements reach, and convex. A convex F_e lies above its tangents, at any point y:
    F_e(s) >= F_e(y) + g . (s - y) with a subgradient g, and above every average of tangents; the minimum over s of a
    linear function takes the m - 1 smallest entries of g. So whatever points are visited, the bound is one; steps of
    Frank-Wolfe only make it better. It is loose, since fractions of mates are cheaper than whole ones, and since mates
    need not agree.

    Points are kept from one call to the next: what is good for one step's tokens is a good start for the next step's.
    """

    STEPS = 4  # of Frank-Wolfe in a call; each passes over all pairs of experts of all tokens
    FIRST_STEPS = 16  # in the first call
    LEAST_STRIDE = 0.05  # so that later calls can still follow their tokens
    ROUNDING = 1e-9  # relative, given away so that sums in float64 cannot lift the bound

    def __init__(self, num_experts: int, hierarchy: Hierarchy, level: int) -> None:
        """Start with mates in equal shares.

        Args:
            num_experts: E.
            hierarchy: groups of GPUs.
            level: 1..D.

        Raises:
            ValueError: E is not divisible by G.
        """
        experts_per_rank(num_experts, hierarchy.num_ranks)
        self.num_experts, self.mates = num_experts, num_experts // hierarchy.U[level] - 1
        self._y_EE = torch.full((num_experts, num_experts), self.mates / max(num_experts - 1, 1), dtype=torch.float64)
        self._y_EE.fill_diagonal_(0)
        self._steps = 0

    def rows(self, sets: TokenSets) -> int:
        """Rows that no placement goes below: distinct (token, group) pairs of these tokens.

        Args:
            sets: expert sets of tokens; merged ones take less time.
        """
        experts = self.num_experts
        ids_NK, weight_N1 = sets.ids_NK, sets.weight_N[:, None].double()
        pair_NKK = ids_NK[:, :, None] * experts + ids_NK[:, None, :]
        expert, pair = ids_NK.reshape(-1), pair_NKK.view(-1)
        constant_E = torch.zeros(experts, dtype=torch.float64)  # of the average tangent
        slope_EE = torch.zeros(experts, experts, dtype=torch.float64)
        best_E = constant_E.clone()
        share = 0.0
        for visited in range(self.FIRST_STEPS if self._steps == 0 else self.STEPS):
            x_NK = self._y_EE.view(-1).index_select(0, pair).view(pair_NKK.shape).sum(2)
            below_NK = x_NK.floor().clamp(max=ids_NK.shape[1] - 1)
            phi_slope_NK = -weight_N1 / ((1 + below_NK) * (2 + below_NK))
            phi_NK = weight_N1 / (1 + below_NK) + (x_NK - below_NK) * phi_slope_NK
            value_E = torch.zeros(experts, dtype=torch.float64).index_add_(0, expert, phi_NK.view(-1))
            tangent_EE = torch.zeros(experts * experts, dtype=torch.float64)
            tangent_EE.index_add_(0, pair, phi_slope_NK[:, :, None].expand(pair_NKK.shape).reshape(-1))
            tangent_EE = tangent_EE.view(experts, experts).fill_diagonal_(0)
            at_zero_E = value_E - (tangent_EE * self._y_EE).sum(1)
            least_E, mates_EE = self._least(at_zero_E, tangent_EE)
            weight = (visited + 1.0) ** 2  # later points are better ones
            share += weight
            constant_E += (at_zero_E - constant_E) * weight / share
            slope_EE += (tangent_EE - slope_EE) * weight / share
            best_E = torch.maximum(best_E, torch.maximum(least_E, self._least(constant_E, slope_EE)[0]))
            stride = max(2 / (self._steps + 6), self.LEAST_STRIDE)
            self._y_EE = self._y_EE + stride * (mates_EE - self._y_EE)
            self._steps += 1
        return math.ceil(float(best_E.sum()) * (1 - self.ROUNDING))

    def _least(self, constant_E: Tensor, slope_EE: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest value of each expert's linear function, and the mates that give it: float64 [E], [E, E]."""
        others = slope_EE.clone().fill_diagonal_(float("inf"))
        value, index = others.topk(self.mates, dim=1, largest=False)
        return constant_E + value.sum(1), torch.zeros_like(slope_EE).scatter_(1, index, 1.0)


@dataclass(frozen=True)
class LeastTraffic:
    """What no placement goes below.

    Attributes:
        scheme: the one with the smallest bound.
        alltoall_ms: of one AlltoAll, mean of a step's.
        rows: distinct (token, group) pairs for levels 1..D, each level by its own best placement.
    """

    scheme: DispatchScheme
    alltoall_ms: float
    rows: tuple[int, ...]


def least_traffic(
    sets: TokenSets,
    bounds: Sequence[MateBound],
    schemes: Sequence[DispatchScheme],
    cluster: Cluster,
    row_bytes: RowBytes,
) -> LeastTraffic:
    """Rows and modelled time of one AlltoAll that no placement goes below, not even one made for these very tokens.

    The busiest GPU of a stage gets at least an even share of the stage's rows. The group with the expert that most
    tokens select needs all of them, and its lanes share them, one lane an even share at least. Stages are bounded one
    by one, each by its own best placement.

    Args:
        sets: of one step.
        bounds: of levels 1..D.
        schemes: candidates that deduplicate; the cheapest counts.
        cluster: hierarchy, alpha and beta.
        row_bytes: in each AlltoAll.

    Raises:
        ValueError: a scheme that does not deduplicate.
    """
    hierarchy = cluster.hierarchy
    weight = sets.weight_N.long().repeat_interleave(sets.ids_NK.shape[1])
    load_E = torch.zeros(sets.num_experts, dtype=torch.int64).index_add_(0, sets.ids_NK.reshape(-1), weight)
    rows = tuple(bound.rows(sets) for bound in bounds)
    hottest = [busiest_rows(int(load_E.max()), hierarchy.lanes(level)) for level in range(1, hierarchy.depth + 1)]
    least = [max(busiest_rows(total, hierarchy.num_ranks), hot) for total, hot in zip(rows, hottest, strict=True)]
    times = []
    for scheme in schemes:
        if not scheme.deduplicates:
            raise ValueError(f"scheme {scheme.name} sends token-expert pairs; its traffic has no such bound")
        least_rows = [least[stage.level(hierarchy) - 1] for stage in scheme.stages]
        times.append(row_bytes.averaged(partial(_alltoall_ms, scheme, least_rows, cluster)))
    best = cheapest(times)
    return LeastTraffic(schemes[best], times[best], rows)


def _alltoall_ms(scheme: DispatchScheme, stage_rows: Sequence[int], cluster: Cluster, row_bytes: float) -> float:
    stage_ms = times_of_stages(scheme, [rows * row_bytes for rows in stage_rows], cluster)
    return time_of_alltoall(scheme, stage_ms, cluster)
