"""Where each expert sits."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hiermoe.routing.step import experts_per_rank


@dataclass(frozen=True)
class Placement:
    """Permutation from logical experts to physical slots. GPU g owns slots [g * E/G, (g + 1) * E/G).

    Attributes:
        slot_E: int64 [E], slot of each logical expert.

    Raises:
        ValueError: ``slot_E`` is not a permutation of 0..E-1.
    """

    slot_E: Tensor

    def __post_init__(self) -> None:
        expected = torch.arange(len(self.slot_E))
        if self.slot_E.dtype != torch.int64 or not torch.equal(self.slot_E.sort().values, expected):
            raise ValueError(f"slot_E={self.slot_E.tolist()} is not an int64 permutation of 0..{len(self.slot_E) - 1}")

    @classmethod
    def identity(cls, num_experts: int) -> "Placement":
        """Expert e in slot e."""
        return cls(torch.arange(num_experts))

    @cached_property
    def is_identity(self) -> bool:
        """Whether every expert e sits in slot e."""
        return torch.equal(self.slot_E, torch.arange(len(self.slot_E)))

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.slot_E)

    def expert_at(self) -> Tensor:
        """Logical expert in each slot: int64 [E], the inverse permutation."""
        return torch.argsort(self.slot_E)

    def rank_of(self, num_ranks: int) -> Tensor:
        """GPU of each logical expert: int64 [E]."""
        return self.slot_E // experts_per_rank(self.num_experts, num_ranks)

    def swapped(self, a: int, b: int) -> "Placement":
        """The placement after logical experts a and b have exchanged their slots."""
        slot_E = self.slot_E.clone()
        slot_E[[a, b]] = self.slot_E[[b, a]]
        return Placement(slot_E)

    def moves_to(self, other: "Placement") -> str:
        """What tells ``other`` from this one, as records keep it: ``17>40 40>17``, logical expert > its new slot."""
        moved = (self.slot_E != other.slot_E).nonzero().flatten().tolist()
        return " ".join(f"{expert}>{int(other.slot_E[expert])}" for expert in moved)

    def after(self, moves: str) -> "Placement":
        """The placement that :meth:`moves_to` told apart from this one."""
        slot_E = self.slot_E.clone()
        for move in moves.split():
            expert, slot = move.split(">")
            slot_E[int(expert)] = int(slot)
        return Placement(slot_E)
