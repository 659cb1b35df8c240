"""Which copy each token uses where it shall go to few groups: not what its source does in general, but what it needs.

A token's experts are covered level by level, outermost first, by few groups that have copies of them. A group that
alone has an expert is needed; then comes, again and again, the group that has most of the experts still open (greedy
set cover). Deeper levels choose inside the groups chosen so far. Of equals the token's own group comes first, then the
one where the source's own choice puts most of its experts, then the nearest, then the next by number from its own on,
so that sources do not all meet in the lowest. Where that leads to no fewer groups, the token stays with its source's
choice. A rank needs its own tokens alone for this.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hiermoe.topology.hierarchy import Hierarchy

MOST_CHOICES = 30  # K: the experts of a token are bits of an int32
_CELLS = 2**15  # tokens x GPUs that a CPU looks at together: in its cache, and too few for torch to call all cores


@dataclass(frozen=True)
class FewestGroups:
    """Where copies of every expert are, and what each source prefers.

    Attributes:
        hierarchy: groups of GPUs.
        per_rank: S / G.
        slot_EG: int64 [E + 1, G], lowest slot of an expert on a GPU; S: it is not there. Expert E is none.
        has_EG: int32 [E + 1, G], 1 where it is there, else 0.
        order_GU: for levels 1..D, int32 [G, U[level]], below (level + 1) * U[level]: which groups are near to each GPU,
            and next by number of those that are as near; the larger, the nearer. Largest: the own one.
    """

    hierarchy: Hierarchy
    per_rank: int
    slot_EG: Tensor
    has_EG: Tensor
    order_GU: tuple[Tensor, ...]

    @classmethod
    def of(cls, expert_at_S: Tensor, num_experts: int, hierarchy: Hierarchy) -> "FewestGroups":
        """From the expert in each slot: int64 [S]."""
        slots, ranks = len(expert_at_S), hierarchy.num_ranks
        per_rank = slots // ranks
        slot_S = torch.arange(slots)
        slot_EG = torch.full(((num_experts + 1) * ranks,), slots)
        slot_EG.scatter_reduce_(0, expert_at_S * ranks + slot_S // per_rank, slot_S, "amin")
        slot_EG = slot_EG.view(num_experts + 1, ranks)
        order_GU = []
        rank_G = torch.arange(ranks)
        near_GU = torch.zeros(ranks, 1, dtype=torch.int64)
        for level, groups in enumerate(hierarchy.groups, start=1):
            own_G, group_U = rank_G // hierarchy.lanes(level), torch.arange(groups)
            is_own_GU = own_G[:, None] == group_U
            near_GU = near_GU.repeat_interleave(groups // near_GU.shape[1], 1) + is_own_GU  # levels shared
            order_GU.append((near_GU * groups + groups - 1 - (group_U - own_G[:, None]) % groups).int())
        return cls(hierarchy, per_rank, slot_EG, (slot_EG < slots).int(), tuple(order_GU))

    def to(self, device: torch.device) -> "FewestGroups":
        """The same on a device."""
        order_GU = tuple(part.to(device) for part in self.order_GU)
        return FewestGroups(self.hierarchy, self.per_rank, self.slot_EG.to(device), self.has_EG.to(device), order_GU)

    def slots_of(self, expert_ids_NK: Tensor, source_N: Tensor, named_NK: Tensor) -> Tensor:
        """Slot that each token's experts are used in: int64 [N, K]. The host does not wait for a GPU.

        Args:
            expert_ids_NK: int64 [N, K], the different experts of each token; E: none.
            source_N: int64 [N], GPU that holds each token.
            named_NK: int64 [N, K], slots that its source uses; S for none.

        Raises:
            ValueError: K is above 30.
        """
        tokens, topk = expert_ids_NK.shape
        if topk > MOST_CHOICES:
            raise ValueError(f"topk={topk} is above {MOST_CHOICES}, the most of which a token can choose copies")
        size = max(1, _CELLS // self.hierarchy.num_ranks if expert_ids_NK.is_cpu else tokens)
        parts = zip(*(whole.split(size) for whole in (expert_ids_NK, source_N, named_NK)), strict=True)
        return torch.cat([self._slots_of(*part) for part in parts])

    def distinct(self, slot_NK: Tensor) -> Tensor:
        """Groups of every level that each token goes to: int64 [D, N]; slot S counts as one more group.

        Args:
            slot_NK: int64 [N, K].
        """
        rank_NK = (slot_NK // self.per_rank).sort(dim=1).values
        found = []
        for level in range(1, self.hierarchy.depth + 1):
            group_NK = rank_NK // self.hierarchy.lanes(level)
            found.append((group_NK[:, 1:] != group_NK[:, :-1]).sum(1) + 1)
        return torch.stack(found)

    def _slots_of(self, ids_NK: Tensor, source_N: Tensor, named_NK: Tensor) -> Tensor:
        tokens, topk = ids_NK.shape
        named_at_NK = named_NK // self.per_rank
        bits_NG = self.has_EG.new_zeros(tokens, self.hierarchy.num_ranks)  # bit k: a copy of the k-th expert is there
        for k, ids_N in enumerate(ids_NK.T):
            bits_NG += self.has_EG[ids_N] << k
        order_NU, span = torch.empty(0), 0
        for level, groups in enumerate(self.hierarchy.groups, start=1):
            lanes, span = self.hierarchy.lanes(level), (level + 1) * groups
            order_NU = self.order_GU[level - 1][source_N]
            order_NU.scatter_add_(1, source_N[:, None] // lanes, torch.full_like(order_NU[:, :1], span * (topk + 1)))
            named_NU = order_NU.new_zeros(tokens, groups + 1)  # and one more for slot S
            named_NU.scatter_add_(1, named_at_NK // lanes, torch.full_like(named_NU[:, :1], span).expand(-1, topk))
            bits_NU, _ = _joined(bits_NG.view(tokens, groups, lanes))
            chosen_NU = _cover(bits_NU, order_NU + named_NU[:, :-1], 2 * span * (topk + 1), topk)
            bits_NG.view(tokens, groups, lanes).masked_fill_(~chosen_NU[:, :, None], 0)
        # Of the GPUs chosen an expert goes to the own one, else to where its source would use it, else to the nearest.
        slots = []
        for k in range(topk):
            wish_NU, at_N = torch.cat([order_NU, order_NU[:, :1]], 1), named_at_NK[:, k]
            wish_NU.scatter_add_(1, at_N[:, None], torch.full_like(wish_NU[:, :1], span))
            rank_N = wish_NU[:, :-1].masked_fill((bits_NG >> k) & 1 == 0, -1).argmax(1)
            slots.append(torch.where(rank_N == at_N, named_NK[:, k], self.slot_EG[ids_NK[:, k], rank_N]))
        slot_NK = torch.stack(slots, 1)
        fewer_N = torch.zeros_like(source_N)  # of groups of the outermost level that differs; below 0: more
        for before_N, after_N in zip(self.distinct(named_NK), self.distinct(slot_NK), strict=True):
            fewer_N = torch.where(fewer_N == 0, before_N - after_N, fewer_N)
        return torch.where(fewer_N[:, None] > 0, slot_NK, named_NK)


def _cover(bits_NU: Tensor, order_NU: Tensor, unit: int, topk: int) -> Tensor:
    """Groups that together have a copy of each of a token's experts: bool [N, U].

    Args:
        bits_NU: int32 [N, U], which of a token's experts have a copy in a group; a bit of none is asked of none.
        order_NU: int32 [N, U], what comes first of groups that have as many of the experts still open.
        unit: larger than any of these numbers.
        topk: K.
    """
    all_N, more_than_once_N = _joined(bits_NU)
    chosen_NU = bits_NU & (all_N & ~more_than_once_N)[:, None] != 0
    open_N = all_N & ~_joined(bits_NU.masked_fill(~chosen_NU, 0))[0]
    for _ in range(min(topk, bits_NU.shape[1])):
        if open_N.is_cpu and not bool(open_N.any()):
            break
        gain_NU = _ones(bits_NU & open_N[:, None])
        best_N1 = (gain_NU * unit + order_NU).masked_fill_(gain_NU == 0, -1).argmax(1, keepdim=True)
        chosen_NU |= torch.zeros_like(chosen_NU).scatter_(1, best_N1, open_N[:, None] != 0)
        open_N = open_N & ~bits_NU.gather(1, best_N1)[:, 0]
    return chosen_NU


def _joined(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Bits that are set anywhere along the last dimension, and those that are set more than once."""
    once, twice = bits, torch.zeros_like(bits)
    while (size := once.shape[-1]) > 1:
        half = size // 2
        left, right, odd = once[..., :half], once[..., half : 2 * half], once[..., 2 * half :]
        more = twice[..., :half] | twice[..., half : 2 * half] | (left & right)
        once, twice = torch.cat([left | right, odd], -1), torch.cat([more, twice[..., 2 * half :]], -1)
    return once[..., 0], twice[..., 0]


def _ones(bits: Tensor) -> Tensor:
    """How many bits of each number are set, of at most 30: by pairs, fours, bytes, then all bytes at once."""
    pairs = bits - ((bits >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return (((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24
