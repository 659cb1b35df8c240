"""What every traffic figure is made of: how many tokens of a source need which group."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hiermoe.routing.step import RoutingStep
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement


@dataclass(frozen=True)
class RoutingCounts:
    """Counts of one step under one placement; all traffic of all schemes follows from them.

    Attributes:
        tokens: for levels 1..D, int64 [G, U[level]]: tokens of a source that need at least one expert of the group.
        pairs_GS: int64 [G, S]: token-expert pairs of a source, by *slot*.
        tokens_G: int64 [G]: tokens of a source.
        topk: K.
    """

    tokens: tuple[Tensor, ...]
    pairs_GS: Tensor
    tokens_G: Tensor
    topk: int

    @property
    def pairs_GG(self) -> Tensor:
        """int64 [G, G]: token-expert pairs from source to destination GPU."""
        num_ranks = len(self.tokens_G)
        return self.pairs_GS.view(num_ranks, num_ranks, -1).sum(-1)

    def needed(self, level: int) -> Tensor:
        """Tokens of all sources that need each group of a level: int64 [U]."""
        return self.tokens[level - 1].sum(0)

    def duplication_rate(self, level: int) -> float:
        """1 - distinct (token, group) / token-expert pairs at a level (paper, Table II)."""
        pairs = int(self.pairs_GS.sum())
        return 1.0 - int(self.tokens[level - 1].sum()) / pairs if pairs else float("nan")


@lru_cache(maxsize=16)
def separating_level(hierarchy: Hierarchy) -> Tensor:
    """First level at which two GPUs are in different groups: int64 [G, G]; D + 1 on the diagonal."""
    rank = torch.arange(hierarchy.num_ranks)
    level = torch.full((hierarchy.num_ranks, hierarchy.num_ranks), hierarchy.depth + 1)
    for i in range(hierarchy.depth, 0, -1):
        group = rank // hierarchy.lanes(i)
        level[group[:, None] != group[None, :]] = i
    return level


@dataclass(frozen=True)
class SortedChoices:
    """The GPUs that each token needs, in rising order, and from which level on neighbours are apart.

    Groups are contiguous in rank order, so the experts of one token that share a group stand side by side at every
    level: an expert is the first of its group at level i exactly where it is separated from its left neighbour at i.

    Attributes:
        slot_NK: int64 [N, K], slots in rising order.
        rank_NK: int64 [N, K], their GPUs.
        first_from_NK: int64 [N, K], level from which on the expert is the first one of its group in the token's order.
        alone_from_NK: int64 [N, K], level from which on it is the token's only expert in its group (D + 1: never).
    """

    slot_NK: Tensor
    rank_NK: Tensor
    first_from_NK: Tensor
    alone_from_NK: Tensor

    def distinct(
        self, kind_N: Tensor, kinds: int, hierarchy: Hierarchy, weight_N: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Tokens of every kind that need at least one expert of each group.

        Args:
            kind_N: int64 [N], kind of each token: its source, or its step.
            kinds: how many there are.
            hierarchy: groups of GPUs.
            weight_N: float64 [N], tokens that each row stands for; None for one.

        Returns:
            For levels 1..D, [kinds, U[level]]: int64, with weights float64.
        """
        levels, ranks = hierarchy.depth + 2, hierarchy.num_ranks
        code = (self.first_from_NK * kinds + kind_N[:, None]).mul_(ranks).add_(self.rank_NK).view(-1)
        weights = None if weight_N is None else weight_N.repeat_interleave(self.rank_NK.shape[1])
        first = torch.bincount(code, weights, minlength=levels * kinds * ranks).view(levels, kinds, ranks)
        newly_first = first.cumsum(0)  # [level, kind, GPU]: experts that are first of their group at that level
        return tuple(newly_first[i].view(kinds, hierarchy.U[i], -1).sum(-1) for i in range(1, hierarchy.depth + 1))


def sort_choices(
    expert_ids_NK: Tensor, placement: Placement, hierarchy: Hierarchy, source_N: Tensor | None = None
) -> SortedChoices:
    """Sort every token's experts by slot.

    Args:
        expert_ids_NK: int64 [N, K], logical experts.
        placement: which expert is in which slot.
        hierarchy: groups of GPUs.
        source_N: int64 [N], GPU that holds each token; needed where experts have copies.

    Raises:
        ValueError: the slots are not divisible by G, or experts have copies and no source is given.
    """
    per_rank = placement.per_rank(hierarchy.num_ranks)
    slot_NK = _rising(placement.slots_of(expert_ids_NK, source_N))
    rank_NK = _divided(slot_NK, per_rank)
    flat = rank_NK[:, :-1] * hierarchy.num_ranks + rank_NK[:, 1:]
    between = separating_level(hierarchy).view(-1).index_select(0, flat.view(-1)).view(flat.shape)  # [N, K-1]
    edge = between.new_ones(len(between), 1)  # nothing to the left of the first or to the right of the last
    left, right = torch.cat([edge, between], 1), torch.cat([between, edge], 1)
    return SortedChoices(slot_NK, rank_NK, left, torch.maximum(left, right))


def _rising(slot_NK: Tensor) -> Tensor:
    """Every row sorted; NumPy sorts short rows in a third of the time that torch takes."""
    return torch.from_numpy(np.sort(slot_NK.numpy(), axis=1)) if slot_NK.is_cpu else slot_NK.sort(dim=1).values


def _divided(slot_NK: Tensor, per_rank: int) -> Tensor:
    """Whole quotients; NumPy divides int64 by a number in a tenth of the time that torch takes."""
    return torch.from_numpy(slot_NK.numpy() // per_rank) if slot_NK.is_cpu else slot_NK // per_rank


def count_routing(step: RoutingStep, placement: Placement, hierarchy: Hierarchy) -> RoutingCounts:
    """Count tokens and token-expert pairs by source and destination, at every level, in O(N * K).

    Raises:
        ValueError: the slots are not divisible by G, or the step has another G or E than hierarchy or placement.
    """
    if step.num_ranks != hierarchy.num_ranks:
        raise ValueError(f"routing has {step.num_ranks} ranks, the hierarchy has {hierarchy.num_ranks}")
    if step.num_experts != placement.num_experts:
        raise ValueError(f"routing has {step.num_experts} experts, the placement has {placement.num_experts}")
    if placement.copy_GE is not None and len(placement.copy_GE) != step.num_ranks:
        raise ValueError(f"routing has {step.num_ranks} ranks, the placement has copies for {len(placement.copy_GE)}")
    num_ranks, num_slots = hierarchy.num_ranks, placement.num_slots
    choices = sort_choices(step.expert_ids_NK, placement, hierarchy, step.source_N)
    tokens = choices.distinct(step.source_N, num_ranks, hierarchy)
    pairs_GS = torch.bincount(
        (step.source_N[:, None] * num_slots + choices.slot_NK).view(-1), minlength=num_ranks * num_slots
    ).view(num_ranks, num_slots)
    tokens_G = torch.bincount(step.source_N, minlength=num_ranks)
    return RoutingCounts(tokens, pairs_GS, tokens_G, step.topk)
