"""On which ways experts get to the GPUs that have copies of them: what is priced, and what is sent."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hiermoe.planner.counts import separating_level
from hiermoe.policies.price_of_moving import held
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement


@dataclass(frozen=True)
class Ways:
    """Hops of experts from GPU to GPU in the order of their experts; gradients go the same hops backwards.

    A GPU gets an expert once, however often it has it.

    Attributes:
        home_E: int64 [E], GPU that each expert is at home on.
        expert_X: int64 [X], what hops.
        source_X: int64 [X], from which GPU.
        target_X: int64 [X], to which other one.
        wave_X: int64 [X], from 1: a hop of wave w sends on what arrived in wave w - 1; of wave 1, what is at home.
    """

    home_E: Tensor
    expert_X: Tensor
    source_X: Tensor
    target_X: Tensor
    wave_X: Tensor

    @property
    def waves(self) -> int:
        """How many follow each other; 0 where nobody has a copy."""
        return int(self.wave_X.max()) if len(self.wave_X) else 0


def ways_of_copies(
    placement: Placement, home: Placement, hierarchy: Hierarchy, relays_from: int | None, num_experts: int
) -> Ways:
    """From where each GPU gets the experts that it has copies of.

    Args:
        placement: in force.
        home: where experts are between steps; of an expert that has copies there too, its lowest slot is its home.
        hierarchy: groups of GPUs. Where copies pass an expert on, the nearest to its home comes first, so that it
            enters every group once.
        relays_from: as in :class:`hiermoe.policies.protocol.CopyTerms`.
        num_experts: E; the placements' numbers from there on are empty slots.
    """
    ranks = hierarchy.num_ranks
    slot_E = torch.full((num_experts,), home.num_slots)
    held_S = home.expert_at_S
    is_expert_S = held_S < num_experts
    slot_E.scatter_reduce_(0, held_S[is_expert_S], torch.arange(home.num_slots)[is_expert_S], "amin")
    home_E = slot_E // home.per_rank(ranks)
    has_EG = held(placement, ranks)[:, :num_experts].T.clone()
    has_EG[torch.arange(num_experts), home_E] = False
    if relays_from is None:
        expert, target = has_EG.nonzero(as_tuple=True)
        return Ways(home_E, expert, home_E[expert], target, torch.ones_like(expert))
    apart_EG = hierarchy.depth + 1 - separating_level(hierarchy)[home_E]  # 0: at home
    near_EG = (apart_EG * ranks + torch.arange(ranks)).masked_fill(~has_EG, ranks * (hierarchy.depth + 2))
    in_order_EG = near_EG.argsort(dim=1, stable=True)
    count_E = has_EG.sum(1)
    expert, number = (torch.arange(ranks) < count_E[:, None]).nonzero(as_tuple=True)
    target = in_order_EG[expert, number]
    before = in_order_EG[expert, (number - 1).clamp(min=0)]
    relayed = (number > 0) & (count_E[expert] >= relays_from)
    source = torch.where(relayed, before, home_E[expert])
    return Ways(home_E, expert, source, target, torch.where(relayed, number + 1, 1))


def part_of_expert(parameters: int, num_ranks: int) -> int:
    """Parameters of an expert that each GPU keeps where everybody keeps a part of it; the last parts are padded."""
    return -(-parameters // num_ranks)
