"""HierD-ES: the modelled time after every possible swap of two experts (paper, Sec. IV), in a few histograms.

Only tokens that select exactly one of r and c see a swap. For r in group A and c in group B of a level, A loses the
tokens whose only expert in A is r (unless they select c, which moves in) and gains the tokens that select c and nothing
in A. Both are sums over tokens of products of indicators: counted once for all pairs and all levels by two histograms
over the K x K pairs of every token, O(N * K^2) where the paper's method takes O(D * N * K * E).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hiermoe.planner.counts import sort_choices
from hiermoe.planner.maxima import MaxFunction
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement


@dataclass(frozen=True)
class SwapStatistics:
    """What the planner must know of the tokens; sums over ranks, all by slot.

    Attributes:
        alone_DEE: int64 [D, E, E]; [i - 1, r, c]: tokens that select c and have r as their only expert in r's group of
            level i.
        present_DEG: int64 [D, E, G]; [i - 1, c, g]: tokens that select c and whose first expert in some group of level
            i sits on GPU g. Summed over the GPUs of a group: tokens that select c and need the group.
        needed_DG: int64 [D, G]; [i - 1, g]: tokens whose first expert in some group of level i sits on GPU g.
        selected_E: int64 [E]: tokens that select the expert.
    """

    alone_DEE: Tensor
    present_DEG: Tensor
    needed_DG: Tensor
    selected_E: Tensor

    def pack(self) -> Tensor:
        """One int64 vector, summable over ranks."""
        return torch.cat(
            [self.alone_DEE.flatten(), self.present_DEG.flatten(), self.needed_DG.flatten(), self.selected_E]
        )

    @classmethod
    def unpack(cls, packed: Tensor, num_experts: int, hierarchy: Hierarchy) -> "SwapStatistics":
        """Inverse of :meth:`pack`."""
        depth, ranks = hierarchy.depth, hierarchy.num_ranks
        sizes = [depth * num_experts**2, depth * num_experts * ranks, depth * ranks, num_experts]
        alone, present, needed, selected = packed.split(sizes)
        return cls(
            alone.view(depth, num_experts, num_experts),
            present.view(depth, num_experts, ranks),
            needed.view(depth, ranks),
            selected,
        )


def measure_swaps(expert_ids_NK: Tensor, placement: Placement, hierarchy: Hierarchy) -> SwapStatistics:
    """Count what :func:`swap_times` needs.

    Args:
        expert_ids_NK: int64 [N, K], logical experts.
        placement: where they sit now.
        hierarchy: groups of GPUs.
    """
    depth, ranks, experts = hierarchy.depth, hierarchy.num_ranks, placement.num_experts
    choices = sort_choices(expert_ids_NK, placement, hierarchy)
    slot_NK = choices.slot_NK

    def histogram(level_NK: Tensor, row_NK: Tensor, row_size: int, column_NK: Tensor, column_size: int) -> Tensor:
        """Pairs (k, k') of a token by level and row of k and column of k', cumulated: [D, rows, columns]."""
        key_NK = (level_NK * row_size + row_NK) * column_size
        code = (key_NK[:, :, None] + column_NK[:, None, :]).view(-1)
        counted = torch.bincount(code, minlength=(depth + 2) * row_size * column_size)
        return counted.view(depth + 2, row_size, column_size)[1 : depth + 1].cumsum(0)

    alone_DEE = histogram(choices.alone_from_NK, slot_NK, experts, slot_NK, experts)
    present_DGE = histogram(choices.first_from_NK, choices.rank_NK, ranks, slot_NK, experts)
    needed = torch.bincount(
        (choices.first_from_NK * ranks + choices.rank_NK).view(-1), minlength=(depth + 2) * ranks
    ).view(depth + 2, ranks)
    selected_E = torch.bincount(slot_NK.reshape(-1), minlength=experts)
    return SwapStatistics(
        alone_DEE, present_DGE.transpose(1, 2).contiguous(), needed[1 : depth + 1].cumsum(0), selected_E
    )


def counts_after_swap(stats: SwapStatistics, hierarchy: Hierarchy, level: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that need each group of a level, now and after every swap (the paper's Z).

    Returns:
        Z_U: int64 [U[level]], now.
        group_E: int64 [E], group of each slot.
        new_EE: int64 [E, E]; ``new_EE[r, c]`` is the count of r's group after slots r and c have exchanged their
            experts. ``new_EE[c, r]`` is that of c's group; all other groups keep theirs. Where r and c share their
            group the entry has no meaning: nothing changes there.
    """
    groups, lanes = hierarchy.U[level], hierarchy.lanes(level)
    num_experts = len(stats.selected_E)
    group_E = torch.arange(num_experts) // (num_experts // groups)
    Z_U = stats.needed_DG[level - 1].view(groups, lanes).sum(1)
    present_EU = stats.present_DEG[level - 1].view(num_experts, groups, lanes).sum(2)
    alone_EE = stats.alone_DEE[level - 1]
    leaves = alone_EE.diagonal()[:, None] - alone_EE  # r was the only one in its group, and c does not move in
    arrives = (stats.selected_E[:, None] - present_EU)[:, group_E].T  # c is selected, and nothing in r's group
    return Z_U, group_E, Z_U[group_E][:, None] - leaves + arrives


def swap_times(
    stats: SwapStatistics, scheme: DispatchScheme, cluster: Cluster, row_bytes: int, max_function: MaxFunction
) -> Tensor:
    """Q: modelled time of one AlltoAll after the exchange of every two slots; the diagonal is no swap.

    Group counts are divided by the lanes of the stage, the GPUs of a group that share its traffic.

    Args:
        stats: summed over all ranks.
        scheme: HDd, d as the step chose it.
        cluster: hierarchy, alpha and beta.
        row_bytes: M * v.
        max_function: smooths the maximum over groups.

    Returns:
        float64 [E, E], in ms, by slot, symmetric.

    Raises:
        ValueError: the scheme does not deduplicate.
    """
    if not scheme.deduplicates:
        raise ValueError(f"HierD-ES prices deduplicated traffic; scheme {scheme.name} sends token-expert pairs")
    hierarchy = cluster.hierarchy
    num_experts = len(stats.selected_E)
    Q_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for stage in scheme.stages:
        level = stage.level(hierarchy)
        Z_U, group_E, new_EE = counts_after_swap(stats, hierarchy, level)
        constants = cluster.constants(stage.peers)
        peak_EE = max_function.after_replacing(Z_U.double(), group_E, new_EE.double())
        Q_EE += constants.alpha_ms + constants.beta_ms_per_byte * row_bytes / hierarchy.lanes(level) * peak_EE
    return Q_EE


def best_swap(Q_EE: Tensor) -> tuple[int, int] | None:
    """Slots of the swap with the smallest time, the lowest (r, c) on ties; None where no swap beats the present.

    A gain of less than a part in 10^9 is rounding, not gain. Times that differ by less than a part in 10^12 are a tie:
    a smooth maximum of the same counts in another order of groups rounds differently.
    """
    lower = torch.ones_like(Q_EE, dtype=torch.bool).tril(-1)
    upper_EE = Q_EE.masked_fill(lower, float("inf"))
    smallest = upper_EE.min()
    if not smallest < Q_EE[0, 0] * (1 - 1e-9):
        return None
    r, c = (upper_EE <= smallest * (1 + 1e-12)).nonzero()[0].tolist()
    return r, c
