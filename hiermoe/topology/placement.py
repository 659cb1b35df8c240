"""Where each expert sits, and which of its copies a token uses."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hiermoe.routing.step import experts_per_rank, num_slots
from hiermoe.topology.fewest_groups import FewestGroups
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.quotas import Shares


@dataclass(frozen=True, eq=False)
class Placement:
    """A map from slots to experts. GPU g owns slots [g * S/G, (g + 1) * S/G).

    An expert may have copies: as many as slots name it. Tokens of one source GPU all use the same copy of an expert,
    or are split among its copies by quotas, or each goes where it needs few groups.

    Attributes:
        expert_at_S: int64 [S], logical expert in each slot, S >= E; each of 0..E-1 at least once.
        copy_GE: int64 [G, E], slot of the copy of expert e that tokens of source GPU g use; None where no expert has
            copies.
        quota_GS: int64 [G, S], of the tokens of source g for the expert in slot s, how many use slot s: in their order,
            in proportion where there are more or fewer (:class:`hiermoe.topology.quotas.Shares`). An expert of which a
            source has no quota is used where ``copy_GE`` says. None: nobody splits.
        gathered_in: a token leaves what ``copy_GE`` and ``quota_GS`` say for copies with which it goes to fewer groups
            of this hierarchy (:class:`hiermoe.topology.fewest_groups.FewestGroups`). None: no token does.

    Raises:
        ValueError: an expert without a slot, a copy that is not where ``copy_GE`` says, or quotas of another shape,
            below 0, or without ``copy_GE``; a hierarchy without it, or of other GPUs.
    """

    expert_at_S: Tensor
    copy_GE: Tensor | None = None
    quota_GS: Tensor | None = None
    gathered_in: Hierarchy | None = None

    def __post_init__(self) -> None:
        found = self.expert_at_S.unique() if self.expert_at_S.dtype == torch.int64 else self.expert_at_S.new_empty(0)
        if not len(found) or not torch.equal(found, torch.arange(len(found))):
            raise ValueError(
                f"expert_at_S={self.expert_at_S.tolist()} is not int64 with each of 0..{len(found) - 1} at least once"
            )
        if self.copy_GE is None:
            if len(found) < len(self.expert_at_S):
                raise ValueError(f"{len(self.expert_at_S)} slots for {len(found)} experts: copies need copy_GE")
        else:
            fits = self.copy_GE.shape[1:] == found.shape and bool((self.copy_GE >= 0).all())
            if not fits or not bool((self.copy_GE < self.num_slots).all()):
                raise ValueError(f"copy_GE does not name slots 0..{self.num_slots - 1} of {len(found)} experts")
            if not bool((self.expert_at_S[self.copy_GE] == found).all()):
                raise ValueError("copy_GE names a slot that another expert sits in")
        if self.quota_GS is not None:
            shape = None if self.copy_GE is None else (len(self.copy_GE), self.num_slots)
            if self.quota_GS.shape != shape or self.quota_GS.dtype != torch.int64 or bool((self.quota_GS < 0).any()):
                raise ValueError(f"quota_GS is not int64 {list(shape or ())}, at least 0, beside a copy_GE")
        if self.gathered_in is not None:
            ranks, sources = self.gathered_in.num_ranks, 0 if self.copy_GE is None else len(self.copy_GE)
            if ranks != sources or self.num_slots % ranks:
                raise ValueError(
                    f"gathered_in has {ranks} GPUs, beside a copy_GE of {sources} for {self.num_slots} slots"
                )

    @classmethod
    def identity(cls, num_experts: int) -> "Placement":
        """Expert e in slot e."""
        return cls(torch.arange(num_experts))

    @classmethod
    def first(cls, num_experts: int, num_ranks: int) -> "Placement":
        """Experts in their order, spread evenly: where G does not divide E, some GPUs have one more than others.

        A GPU that has one fewer keeps its last slot empty. The numbers from E on stand for empty slots: no token
        chooses them, and nothing moves with them.

        Raises:
            ValueError: E is smaller than G.
        """
        slots = num_slots(num_experts, num_ranks)
        if slots == num_experts:
            return cls.identity(num_experts)
        rank_E = torch.arange(num_experts) * num_ranks // num_experts
        first_G = torch.searchsorted(rank_E, torch.arange(num_ranks))
        slot_E = rank_E * (slots // num_ranks) + torch.arange(num_experts) - first_G[rank_E]
        is_empty = torch.ones(slots, dtype=torch.bool)
        is_empty[slot_E] = False
        return cls.of_slots(torch.cat([slot_E, is_empty.nonzero().flatten()]))

    @classmethod
    def of_slots(cls, slot_E: Tensor) -> "Placement":
        """The placement without copies in which expert e sits in slot ``slot_E[e]``.

        Raises:
            ValueError: ``slot_E`` is not a permutation of 0..E-1.
        """
        if slot_E.dtype != torch.int64 or not torch.equal(slot_E.sort().values, torch.arange(len(slot_E))):
            raise ValueError(f"slot_E={slot_E.tolist()} is not an int64 permutation of 0..{len(slot_E) - 1}")
        placement = cls(torch.argsort(slot_E))
        placement.__dict__["slot_E"] = slot_E  # known, so not sorted for again
        return placement

    @property
    def num_slots(self) -> int:
        """S."""
        return len(self.expert_at_S)

    @cached_property
    def num_experts(self) -> int:
        """E."""
        return self.num_slots if self.copy_GE is None else self.copy_GE.shape[1]

    @property
    def has_copies(self) -> bool:
        """Whether there are more slots than experts."""
        return self.num_slots > self.num_experts

    @cached_property
    def is_identity(self) -> bool:
        """Whether every expert e sits in slot e, and nowhere else."""
        return torch.equal(self.expert_at_S, torch.arange(self.num_experts))

    @cached_property
    def slot_E(self) -> Tensor:
        """Slot of each logical expert: int64 [E].

        Raises:
            ValueError: experts have copies, so that they have no one slot.
        """
        if self.has_copies:
            raise ValueError(f"{self.num_experts} experts have {self.num_slots} slots: a copy depends on the source")
        return torch.argsort(self.expert_at_S)

    @cached_property
    def key(self) -> bytes:
        """The same for equal placements, and for no others."""
        maps = (self.expert_at_S, self.copy_GE, self.quota_GS)
        parts = [part.numpy().tobytes() for part in maps if part is not None]
        return b"|".join(parts if self.gathered_in is None else [*parts, repr(self.gathered_in.groups).encode()])

    @cached_property
    def shares(self) -> Shares | None:
        """How sources split their tokens; None where none does."""
        if self.quota_GS is None or self.copy_GE is None:
            return None
        return Shares.of(self.expert_at_S, self.copy_GE, self.quota_GS)

    @cached_property
    def fewest_groups(self) -> FewestGroups | None:
        """How tokens choose copies for themselves; None where none does."""
        if self.gathered_in is None:
            return None
        return FewestGroups.of(self.expert_at_S, self.num_experts, self.gathered_in)

    def per_rank(self, num_ranks: int) -> int:
        """S / G, slots of a GPU.

        Raises:
            ValueError: S is not divisible by G.
        """
        return experts_per_rank(self.num_slots, num_ranks, "num_slots" if self.has_copies else "num_experts")

    def slots_of(self, expert_ids_NK: Tensor, source_N: Tensor | None = None) -> Tensor:
        """Slot that each token's chosen experts are used in: int64 [N, K].

        Args:
            expert_ids_NK: int64 [N, K], logical experts.
            source_N: int64 [N], GPU that holds each token; needed where experts have copies. Where sources split their
                tokens these are all tokens of a source, in its order.

        Raises:
            ValueError: experts have copies, and nobody says who asks.
        """
        if self.copy_GE is None or source_N is None:
            return self.slot_E.index_select(0, expert_ids_NK.reshape(-1)).view(expert_ids_NK.shape)
        if self.shares is not None:
            choice_NK = source_N[:, None] * self.num_experts + expert_ids_NK
            named_NK = self.shares.slots_of(choice_NK.view(-1)).view(choice_NK.shape)
        else:
            named_NK = self.copy_GE[source_N[:, None], expert_ids_NK]
        if self.fewest_groups is None:
            return named_NK
        return self.fewest_groups.slots_of(expert_ids_NK, source_N, named_NK)

    def rank_of(self, num_ranks: int) -> Tensor:
        """GPU of each logical expert: int64 [E].

        Raises:
            ValueError: experts have copies, or E is not divisible by G.
        """
        return self.slot_E // self.per_rank(num_ranks)

    def on_ranks(self, rank_E: Tensor, num_ranks: int) -> "Placement":
        """The placement with experts on other GPUs: who stays keeps its slot, newcomers take the free ones in order.

        Args:
            rank_E: int64 [E], GPU of each expert, E / G of them on each.
            num_ranks: G.
        """
        stays = self.rank_of(num_ranks) == rank_E
        slot_E = torch.where(stays, self.slot_E, -1)
        free = torch.ones(len(rank_E), dtype=torch.bool)
        free[self.slot_E[stays]] = False
        moving = (~stays).nonzero().flatten()
        newcomers = moving[torch.argsort(rank_E[moving], stable=True)]
        slot_E[newcomers] = free.nonzero().flatten()  # both by GPU, as many free slots on each as newcomers
        return Placement.of_slots(slot_E)

    def swapped(self, a: int, b: int) -> "Placement":
        """The placement after logical experts a and b have exchanged their slots."""
        slot_E = self.slot_E.clone()
        slot_E[[a, b]] = self.slot_E[[b, a]]
        return Placement.of_slots(slot_E)

    def changed_slots(self, other: "Placement") -> list[int]:
        """Slots in which ``other`` has another expert, or that this placement does not have."""
        both = min(self.num_slots, other.num_slots)
        changed = (self.expert_at_S[:both] != other.expert_at_S[:both]).nonzero().flatten().tolist()
        return [*changed, *range(both, other.num_slots)]

    def moves_to(self, other: "Placement") -> str:
        """What tells ``other`` from this one, as records keep it.

        ``17>40 40>17``: logical expert > its new slot. Where experts have copies, before or after, ``40<17``: slot <
        its new expert.
        """
        if not (self.has_copies or other.has_copies):
            moved = (self.slot_E != other.slot_E).nonzero().flatten().tolist()
            return " ".join(f"{expert}>{int(other.slot_E[expert])}" for expert in moved)
        return " ".join(f"{slot}<{int(other.expert_at_S[slot])}" for slot in self.changed_slots(other))

    def after(self, moves: str) -> "Placement":
        """The placement that :meth:`moves_to` told apart from this one.

        Raises:
            ValueError: experts have copies: the text does not say who uses which.
        """
        slot_E = self.slot_E.clone()
        for move in moves.split():
            expert, slot = move.split(">")
            slot_E[int(expert)] = int(slot)
        return Placement.of_slots(slot_E)
