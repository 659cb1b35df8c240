"""Exact traffic of a scheme: rows from every GPU to every other, stage by stage."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hiermoe.planner.counts import RoutingCounts
from hiermoe.planner.scheme import DispatchScheme, Padding, stage_routes
from hiermoe.topology.hierarchy import Hierarchy


@dataclass(frozen=True)
class Traffic:
    """Rows that the dispatch of one layer moves. Combine moves the same rows the other way.

    Attributes:
        rows_SGG: int64 [stage, source, destination]; the diagonal is the GPU's own share.
        dropped_pairs: token-expert pairs that padding dropped.
        total_pairs: token-expert pairs of the step.
    """

    rows_SGG: Tensor
    dropped_pairs: int
    total_pairs: int

    def busiest_rows(self) -> Tensor:
        """int64 [stage]: rows at the busiest receiver, its own share included (in combine: at the busiest sender)."""
        return self.rows_SGG.sum(1).amax(1)

    def crossing_rows(self) -> Tensor:
        """int64 [stage]: rows that leave their GPU."""
        return self.rows_SGG.sum((1, 2)) - self.rows_SGG.diagonal(dim1=1, dim2=2).sum(1)


def exact_traffic(scheme: DispatchScheme, counts: RoutingCounts, hierarchy: Hierarchy) -> Traffic:
    """Rows of every stage of a scheme.

    Args:
        scheme: how tokens move.
        counts: one step under one placement.
        hierarchy: groups of GPUs.

    Returns:
        The traffic; for a padded scheme with the padding rows in it.
    """
    num_ranks = hierarchy.num_ranks
    total_pairs = int(counts.pairs_GS.sum())
    pairs_GG, dropped = counts.pairs_GG, 0
    if scheme.padding:
        pairs_GG, dropped = _padded_pairs(scheme.padding, counts)
    rows = []
    for stage, route in zip(scheme.stages, stage_routes(scheme, hierarchy), strict=True):
        amount = counts.tokens[stage.level(hierarchy) - 1] if stage.rows == "token" else pairs_GG
        flat = torch.zeros(num_ranks * num_ranks, dtype=torch.int64)
        rows.append(flat.index_add_(0, route.view(-1), amount.reshape(-1)).view(num_ranks, num_ranks))
    return Traffic(torch.stack(rows), dropped, total_pairs)


def expert_capacity(padding: Padding, counts: RoutingCounts) -> int:
    """C, rows for every (source, slot) of a padded scheme: a copy pads as an expert of its own."""
    if padding.capacity_factor == 0:
        return int(counts.pairs_GS.max())
    tokens, num_slots = int(counts.tokens_G.max()), counts.pairs_GS.shape[1]
    return counts.topk * int(padding.capacity_factor * math.ceil(tokens / num_slots))


def pair_traffic(scheme: DispatchScheme, counts: RoutingCounts, hierarchy: Hierarchy) -> Tensor:
    """Token-expert pairs that ride on the rows of every stage: int64 [stage, source, destination].

    For stages of pairs that is their rows; for stages of tokens it is what their metadata must name.
    """
    pairs = tuple(replace(stage, rows="pair") for stage in scheme.stages)
    return exact_traffic(replace(scheme, stages=pairs), counts, hierarchy).rows_SGG


def _padded_pairs(padding: Padding, counts: RoutingCounts) -> tuple[Tensor, int]:
    """C rows for every (source, slot): int64 [G, G], and how many pairs did not fit."""
    num_ranks, num_slots = counts.pairs_GS.shape
    capacity = expert_capacity(padding, counts)
    dropped = int((counts.pairs_GS - capacity).clamp(min=0).sum())
    rows = torch.full((num_ranks, num_ranks), capacity * (num_slots // num_ranks), dtype=torch.int64)
    return rows, dropped
