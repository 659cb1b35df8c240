"""Which copy each token uses where one source GPU splits its tokens among the copies of an expert."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shares:
    """The copies of every choice, laid end to end, each as long as its quota.

    A choice C is an expert as one source GPU asks for it. Of its c tokens, in their order, the n-th (from 0) stands at
    floor((n + 1/2) * Q / c) of the Q that its copies hold together, and uses the copy that lies there. Where c = Q that
    hands out the quotas exactly, copy by copy. Where Q = 0 all tokens use one named copy.

    Attributes:
        start_C: int64 [C], where the copies of a choice begin.
        total_C: int64 [C], Q, the sum of their quotas.
        otherwise_C: int64 [C], slot where Q is 0.
        end_X: int64 [X], where each copy ends.
        slot_X: int64 [X], its slot.
    """

    start_C: Tensor
    total_C: Tensor
    otherwise_C: Tensor
    end_X: Tensor
    slot_X: Tensor

    @classmethod
    def of(cls, expert_at_S: Tensor, copy_GE: Tensor, quota_GS: Tensor) -> "Shares":
        """Of all sources: choice g * E + e.

        Args:
            expert_at_S: int64 [S], expert in each slot.
            copy_GE: int64 [G, E], slot where a source has no quota of an expert.
            quota_GS: int64 [G, S], tokens of a source for a slot.
        """
        sources, experts = copy_GE.shape
        slot_S = torch.argsort(expert_at_S, stable=True)
        end_X = quota_GS[:, slot_S].reshape(-1).cumsum(0)
        total_GE = torch.zeros_like(copy_GE).index_add_(1, expert_at_S, quota_GS)
        total_C = total_GE.view(sources * experts)
        return cls(total_C.cumsum(0) - total_C, total_C, copy_GE.reshape(-1), end_X, slot_S.repeat(sources))

    def of_source(self, source: int, num_experts: int, device: torch.device) -> "Shares":
        """Of one source, on a device: choice e; choice E is none, in slot S."""
        slots = len(self.slot_X) // (len(self.total_C) // num_experts)
        choices, copies = (slice(source * n, (source + 1) * n) for n in (num_experts, slots))
        first = self.start_C[source * num_experts]
        start_C = F.pad(self.start_C[choices] - first, (0, 1))
        total_C, otherwise_C = (
            F.pad(self.total_C[choices], (0, 1)),
            F.pad(self.otherwise_C[choices], (0, 1), value=slots),
        )
        parts = (start_C, total_C, otherwise_C, self.end_X[copies] - first, self.slot_X[copies])
        return Shares(*[part.to(device) for part in parts])

    def slots_of(self, choice_P: Tensor) -> Tensor:
        """Slot that each token-expert pair uses: int64 [P]. The host does not wait for a GPU.

        Args:
            choice_P: int64 [P], choices in the order of the tokens: all of a source's.
        """
        order_P = torch.argsort(choice_P, stable=True)
        count_C = torch.zeros_like(self.total_C).index_add_(0, choice_P, torch.ones_like(choice_P))
        first_C = count_C.cumsum(0) - count_C
        number_P = torch.empty_like(choice_P)
        number_P[order_P] = torch.arange(len(choice_P), device=choice_P.device)
        number_P -= first_C[choice_P]  # n
        total_P = self.total_C[choice_P]
        place_P = self.start_C[choice_P] + (2 * number_P + 1) * total_P // (2 * count_C[choice_P])
        index_P = torch.searchsorted(self.end_X, place_P, right=True).clamp_(max=len(self.slot_X) - 1)
        return torch.where(total_P > 0, self.slot_X[index_P], self.otherwise_C[choice_P])
