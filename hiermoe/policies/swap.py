"""HierD-ES: the modelled time after every possible swap of two experts (paper, Sec. IV), in a few histograms.

Only tokens that select exactly one of r and c see a swap. For r in group A and c in group B of a level, A loses the
tokens whose only expert in A is r (unless they select c, which moves in) and gains the tokens that select c and nothing
in A. Both are sums over tokens of products of indicators: counted once for all pairs and all levels by two histograms
over the K x K pairs of every token, O(N * K^2) where the paper's method takes O(D * N * K * E).

Several swaps at once: what a group needs depends on its set of experts alone. So swaps that change different groups add
up exactly; where two of them change the same group, the pairs counted here give an upper bound (:meth:`swapped`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hiermoe.model import RowBytes
from hiermoe.planner.cost import time_by_groups
from hiermoe.planner.counts import separating_level, sort_choices
from hiermoe.planner.maxima import MaxFunction
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement

LARGEST_SUM = 2**31  # token-expert pairs below which no int32 count can overflow: each counts a token once at most
CHUNK_TOKENS = 2048  # counted at once, so that what is made of [tokens, K, K] stays in the cache
PAIRS_UNIT = 1024  # token-expert pairs are summed in this unit, so that their own sum cannot overflow


@dataclass(frozen=True)
class SlotPairs:
    """All pairs of slots r < c on different GPUs, those that an outer level separates first.

    So the pairs that are apart at a level are the first ``count[level]``, at every level.

    Attributes:
        slots_2P: int64 [2, P]; r and c of every pair.
        count: for levels 0..D, number of pairs in different groups.
        entry_P2: int64 [2P], flat; index into a flat [E, E] of (r, c) and of (c, r), of every pair.
        place_EE: int32 [E * E], flat; where the ordered pair (r, c) is kept in a list of both directions of every pair:
            2p for r < c, 2p + 1 for r > c. Pairs on one GPU have no place of their own.
        group_E: for levels 1..D, int64 [E], group of each slot.
        entry_2P: for levels 1..D, int64 [2, count]; index into a flat [U, E] of (r's group, c) and of (c's group, r).
        groups_P: for levels 1..D, int64 [count]; index into a flat [U, U] of (r's group, c's group).
    """

    slots_2P: Tensor
    count: tuple[int, ...]
    entry_P2: Tensor
    place_EE: Tensor
    group_E: tuple[Tensor, ...]
    entry_2P: tuple[Tensor, ...]
    groups_P: tuple[Tensor, ...]


@lru_cache(maxsize=16)
def slot_pairs(num_experts: int, hierarchy: Hierarchy) -> SlotPairs:
    """Pairs of slots of E experts on a hierarchy, in the order that all ranks share."""
    rank_E = torch.arange(num_experts) // (num_experts // hierarchy.num_ranks)
    slots_2P = torch.triu_indices(num_experts, num_experts, offset=1)
    level_P = separating_level(hierarchy)[rank_E[slots_2P[0]], rank_E[slots_2P[1]]]
    order = torch.argsort(level_P, stable=True)[: int((level_P <= hierarchy.depth).sum())]
    slots_2P, level_P = slots_2P[:, order].contiguous(), level_P[order]
    r_P, c_P = slots_2P
    entry_P2 = torch.stack([r_P * num_experts + c_P, c_P * num_experts + r_P], 1).view(-1)
    place_EE = torch.zeros(num_experts * num_experts, dtype=torch.int32)
    place_EE[entry_P2] = torch.arange(len(entry_P2), dtype=torch.int32)
    levels = range(1, hierarchy.depth + 1)
    count = tuple(int((level_P <= level).sum()) for level in range(hierarchy.depth + 1))
    group_E = tuple(rank_E // hierarchy.lanes(level) for level in levels)
    entries, groups = [], []
    for level, group in zip(levels, group_E, strict=True):
        r, c = slots_2P[:, : count[level]]
        entries.append(torch.stack([group[r] * num_experts + c, group[c] * num_experts + r]))
        groups.append(group[r] * hierarchy.U[level] + group[c])
    return SlotPairs(slots_2P, count, entry_P2, place_EE, group_E, tuple(entries), tuple(groups))


@dataclass(frozen=True)
class LevelCounts:
    """What the planner must know of the tokens at one level; views of a sum over ranks, all by slot.

    Attributes:
        alone_P2: int [count, 2]; for every pair apart at the level: tokens that select c and have r as their only
            expert in r's group, and the same with r and c exchanged.
        alone_E: int [E]; tokens whose only expert in the slot's group is the slot's.
        absent_UE: int [U, E]; tokens that select the slot's expert and nothing in the group.
        needed_U: int [U]; tokens that need the group.
    """

    alone_P2: Tensor
    alone_E: Tensor
    absent_UE: Tensor
    needed_U: Tensor


@dataclass(frozen=True)
class SwapStatistics:
    """Counts of every level under one placement.

    Attributes:
        num_experts: E.
        hierarchy: groups of GPUs.
        levels: of levels 1..D.
        moved: slots whose experts have been exchanged since the tokens were counted.
    """

    num_experts: int
    hierarchy: Hierarchy
    levels: tuple[LevelCounts, ...]
    moved: tuple[int, ...] = ()

    @property
    def pairs(self) -> SlotPairs:
        """The pairs of slots that a swap may exchange."""
        return slot_pairs(self.num_experts, self.hierarchy)

    @property
    def needed(self) -> tuple[Tensor, ...]:
        """Tokens that need each group now: int [U] for levels 1..D."""
        return tuple(counts.needed_U for counts in self.levels)

    @classmethod
    def unpack(cls, summed: Tensor, num_experts: int, hierarchy: Hierarchy) -> "SwapStatistics":
        """Read the sum of what :func:`measure_swaps` has returned, without copying it.

        Args:
            summed: int [X], over all micro-batches and ranks.
            num_experts: E.
            hierarchy: groups of GPUs.

        Raises:
            ValueError: so many tokens were summed that an int32 count might have overflowed.
        """
        if int(summed[-1]) * PAIRS_UNIT >= LARGEST_SUM:
            raise ValueError(
                f"swap statistics of about {int(summed[-1]) * PAIRS_UNIT} token-expert pairs: int32 counts are safe "
                f"below {LARGEST_SUM}, summed over ranks and micro-batches; sum fewer micro-batches"
            )
        parts = iter(summed.split([*_part_sizes(num_experts, hierarchy), 1]))
        levels = tuple(
            LevelCounts(next(parts).view(-1, 2), next(parts), next(parts).view(groups, num_experts), next(parts))
            for groups in hierarchy.groups
        )
        return cls(num_experts, hierarchy, levels)

    def needed_after(self, r: int, c: int) -> tuple[Tensor, ...]:
        """Tokens that need each group after slots r and c have exchanged their experts: int [U] for levels 1..D."""
        found = []
        for level, counts in enumerate(self.levels, start=1):
            size, alone = self.num_experts // self.hierarchy.U[level], counts.alone_P2.view(-1)
            needed_U = counts.needed_U.clone()
            if r // size != c // size:
                for out, into in ((r, c), (c, r)):
                    stays = alone[self.pairs.place_EE[out * self.num_experts + into]] - counts.alone_E[out]
                    needed_U[out // size] += stays + counts.absent_UE[out // size, into]
            found.append(needed_U)
        return tuple(found)

    def swapped(self, r: int, c: int) -> "SwapStatistics":
        """Counts after slots r and c have exchanged their experts, as far as these counts determine them.

        What each group needs is exact where it has exchanged one expert, and an upper bound where it has exchanged
        several: a token whose only two experts in the group both leave is still counted, one that selects two of those
        that come is counted twice. Counts of experts that stay follow the same rule; those of the two that have moved
        are lost, so neither can move again.

        Args:
            r: slot, its expert not moved before.
            c: slot, its expert not moved before.
        """
        place_EE = self.pairs.place_EE.view(self.num_experts, -1)
        levels = []
        for level, (counts, needed_U) in enumerate(zip(self.levels, self.needed_after(r, c), strict=True), start=1):
            size, alone = self.num_experts // self.hierarchy.U[level], counts.alone_P2.view(-1)
            alone_E, absent_UE = counts.alone_E.clone(), counts.absent_UE.clone()
            if r // size != c // size:
                for out, into in ((r, c), (c, r)):
                    group = out // size
                    inside = slice(group * size, (group + 1) * size)
                    alone_E[inside] -= alone[place_EE[inside, into]]
                    for outside in (slice(inside.start), slice(inside.stop, None)):
                        absent_UE[group, outside] += alone[place_EE[out, outside]]
            levels.append(LevelCounts(counts.alone_P2, alone_E, absent_UE, needed_U))
        return SwapStatistics(self.num_experts, self.hierarchy, tuple(levels), (*self.moved, r, c))


def _part_sizes(num_experts: int, hierarchy: Hierarchy) -> list[int]:
    """Entries of each part of the packed statistics, level by level."""
    count = slot_pairs(num_experts, hierarchy).count
    return [
        size
        for level, groups in enumerate(hierarchy.groups, start=1)
        for size in (2 * count[level], num_experts, groups * num_experts, groups)
    ]


def measure_swaps(
    expert_ids_NK: Tensor, placement: Placement, hierarchy: Hierarchy, weight_N: Tensor | None = None
) -> Tensor:
    """Count what :func:`swap_times` needs, as one vector that can be summed over micro-batches and ranks.

    Args:
        expert_ids_NK: int64 [N, K], logical experts.
        placement: where they sit now.
        hierarchy: groups of GPUs.
        weight_N: int32 [N], tokens that each row stands for; None for one.

    Returns:
        int32 [X], read by :meth:`SwapStatistics.unpack`; 0.99 MB for 256 experts on 32 GPUs in four levels.
    """
    depth, ranks, experts = hierarchy.depth, hierarchy.num_ranks, placement.num_experts
    choices = sort_choices(expert_ids_NK, placement, hierarchy)
    pairs, slot_NK = slot_pairs(experts, hierarchy), choices.slot_NK
    tokens, topk = slot_NK.shape
    code_CKK = torch.empty(min(CHUNK_TOKENS, tokens), topk, topk, dtype=torch.int64)
    one = torch.ones((), dtype=torch.int32)

    def repeated(part: slice, times: int) -> Tensor:
        """The weight of each token, for all its entries."""
        if weight_N is None:
            return one.expand(len(slot_NK[part]) * times)
        return weight_N[part].repeat_interleave(times)

    def histogram(level_NK: Tensor, kind_NK: Tensor, kinds: int) -> Tensor:
        """Pairs of a choice's kind and a slot of the same token, from the level on at which they hold for the choice.

        Returns:
            int32 [D + 1, kinds * E]; a pair counts at its level and at all after it.
        """
        counted = torch.zeros(depth + 1, kinds * experts, dtype=torch.int32)
        code_NK = ((level_NK - 1) * kinds + kind_NK) * experts
        for start in range(0, tokens, CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            code = code_CKK[: len(slot_NK[part])]  # new memory for each would cost more than the count
            torch.add(code_NK[part, :, None], slot_NK[part, None, :], out=code)
            counted.view(-1).scatter_add_(0, code.view(-1), repeated(part, topk * topk))
        for level in range(1, depth):
            counted[level] += counted[level - 1]
        return counted

    alone = histogram(choices.alone_from_NK, slot_NK, experts)
    present = histogram(choices.first_from_NK, choices.rank_NK, ranks)
    needed = choices.distinct(slot_NK.new_zeros(tokens), 1, hierarchy, None if weight_N is None else weight_N.double())
    selected_E = torch.zeros(experts, dtype=torch.int32)
    selected_E.scatter_add_(0, slot_NK.view(-1), repeated(slice(None), topk))
    parts = []
    for level, groups in enumerate(hierarchy.groups, start=1):
        absent_UE = selected_E - present[level - 1].view(groups, -1, experts).sum(1, dtype=torch.int32)
        parts += [
            alone[level - 1].index_select(0, pairs.entry_P2[: 2 * pairs.count[level]]),
            alone[level - 1, :: experts + 1],
            absent_UE.view(-1),
            needed[level - 1].view(-1).int(),
        ]
    pairs_counted = topk * (tokens if weight_N is None else int(weight_N.sum()))
    return torch.cat([*parts, torch.tensor([-(-pairs_counted // PAIRS_UNIT)], dtype=torch.int32)])


def counts_after_swap(stats: SwapStatistics, level: int) -> Tensor:
    """Tokens that need r's group and c's group after every swap of two slots that are apart at a level (paper: Z).

    Returns:
        int [2, count[level]]; all other groups keep what they need. No meaning where one of the two has moved before.
    """
    pairs, counts = stats.pairs, stats.levels[level - 1]
    stays_E = counts.needed_U[pairs.group_E[level - 1]] - counts.alone_E  # need the group without the slot
    result = counts.alone_P2.T.clone(memory_format=torch.contiguous_format)  # of one pair, contiguous() is no copy
    result += counts.absent_UE.view(-1).index_select(0, pairs.entry_2P[level - 1].view(-1)).view(result.shape)
    for row, slot_P in zip(result, pairs.slots_2P[:, : pairs.count[level]], strict=True):
        row += stays_E.index_select(0, slot_P)
    return result


@dataclass(frozen=True)
class SwapTimes:
    """Q: modelled time of one AlltoAll after every swap.

    Attributes:
        slots_2P: int64 [2, P]; the pairs of slots, r < c.
        now_ms: without a swap.
        after_ms_P: float64 [P]; infinite where one of the two has moved before. Pairs on one GPU change nothing and
            have no entry.
    """

    slots_2P: Tensor
    now_ms: float
    after_ms_P: Tensor

    def best(self) -> tuple[int, int] | None:
        """Slots of the swap with the smallest time, the lowest (r, c) on ties; None where no swap beats the present.

        A gain of less than a part in 10^9 is rounding, not gain. Times that differ by less than a part in 10^12 are a
        tie: a smooth maximum of the same counts in another order of groups rounds differently.
        """
        if not len(self.after_ms_P):
            return None
        smallest = float(self.after_ms_P.min())
        if not smallest < self.now_ms * (1 - 1e-9):
            return None
        tied = (self.after_ms_P <= smallest * (1 + 1e-12)).nonzero().flatten()
        return min(zip(*self.slots_2P[:, tied].tolist(), strict=True))


def swap_times(
    stats: SwapStatistics, scheme: DispatchScheme, cluster: Cluster, row_bytes: RowBytes, max_function: MaxFunction
) -> SwapTimes:
    """Q: modelled time of one AlltoAll after the exchange of every two slots.

    Group counts are divided by the lanes of the stage, the GPUs of a group that share its traffic.

    Args:
        stats: summed over all ranks.
        scheme: HDd, d as the step chose it.
        cluster: hierarchy, alpha and beta.
        row_bytes: in each AlltoAll of a step.
        max_function: smooths the maximum over groups.

    Raises:
        ValueError: the scheme does not deduplicate.
    """
    pairs = stats.pairs

    def busiest_P(level: int) -> Tensor:
        """After every swap; those of slots that are not apart at the level change nothing there."""
        now_U, groups_P = stats.levels[level - 1].needed_U, pairs.groups_P[level - 1]
        apart_P = max_function.after_replacing(now_U, groups_P, counts_after_swap(stats, level))
        rest = pairs.slots_2P.shape[1] - len(apart_P)
        return torch.cat([apart_P, max_function(now_U.double()).expand(rest)]) if rest else apart_P

    after_ms_P = time_by_groups(scheme, busiest_P, cluster, row_bytes)
    for slot in stats.moved:
        after_ms_P.masked_fill_((pairs.slots_2P == slot).any(0), float("inf"))
    now_ms = time_of_groups(stats.needed, scheme, cluster, row_bytes, max_function)
    return SwapTimes(pairs.slots_2P, now_ms, after_ms_P)


def time_of_groups(
    needed: Sequence[Tensor], scheme: DispatchScheme, cluster: Cluster, row_bytes: RowBytes, max_function: MaxFunction
) -> float:
    """Modelled time of one AlltoAll, in ms.

    Args:
        needed: int [U] for levels 1..D, tokens that need each group.
        scheme: HDd.
        cluster: hierarchy, alpha and beta.
        row_bytes: in each AlltoAll of a step.
        max_function: over groups.

    Raises:
        ValueError: the scheme does not deduplicate.
    """
    return time_by_groups(scheme, lambda level: float(max_function(needed[level - 1].double())), cluster, row_bytes)
