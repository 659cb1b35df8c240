"""What copies of experts cost in a step: weights sent to them, gradients sent home, memory of their slots."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hiermoe.model import LayerSizes
from hiermoe.planner.counts import separating_level
from hiermoe.policies.price_of_moving import (
    STATE_BYTES_PER_PARAMETER,
    WEIGHT_BYTES_PER_PARAMETER,
    Migration,
    held,
    price_transfers,
)
from hiermoe.policies.protocol import CopyTerms
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement


@dataclass(frozen=True)
class CopyCost:
    """Modelled cost of the copies of one layer in one step.

    Attributes:
        weights: from home to every GPU with a copy, as often as the terms say; to copies with training state the summed
            gradient.
        gradients: the same way back, once.
        slots_gb: 10^9 bytes of weights and gradients, and of training state where copies keep it, in a GPU's slots
            beyond those of its own experts, in all layers; layers that share buffers need them once. NaN where the
            number of layers is not known.
    """

    weights: Migration
    gradients: Migration
    slots_gb: float


def price_copies(
    placement: Placement, home: Placement, cluster: Cluster, terms: CopyTerms, sizes: LayerSizes
) -> CopyCost:
    """Price the copies of a step.

    Args:
        placement: in force.
        home: where experts are between steps; of an expert that has copies there too, its lowest slot is its home.
        cluster: links and betas.
        terms: of the policy.
        sizes: of the layer.
    """
    ranks, experts, parameters = cluster.hierarchy.num_ranks, sizes.num_experts, sizes.expert_parameters
    per_rank = placement.per_rank(ranks)
    if terms.sharded:
        source, target = (~torch.eye(ranks, dtype=torch.bool)).nonzero(as_tuple=True)
        parameters, own = -(-parameters * per_rank // ranks), 0  # from each other GPU, for all slots
    else:
        source, target = _transfers(placement, home, cluster.hierarchy, terms.relays_from, experts)
        own = -(-experts // ranks)
    sends = 2 if terms.shared_buffers else 1
    sent_bytes = terms.gradient_bytes if terms.with_state else sends * WEIGHT_BYTES_PER_PARAMETER
    weights = price_transfers(source, target, cluster, sent_bytes * parameters)
    gradients = price_transfers(target, source, cluster, terms.gradient_bytes * parameters)
    layers = 1 if terms.shared_buffers else sizes.num_layers or float("nan")
    kept_bytes = STATE_BYTES_PER_PARAMETER if terms.with_state else WEIGHT_BYTES_PER_PARAMETER
    slot_bytes = (kept_bytes + terms.gradient_bytes) * sizes.expert_parameters
    return CopyCost(weights, gradients, (per_rank - own) * slot_bytes * layers / 1e9)


def _transfers(
    placement: Placement, home: Placement, hierarchy: Hierarchy, relays_from: int | None, experts: int
) -> tuple[Tensor, Tensor]:
    """From which GPU each copy comes to which: int64 [X] both. A GPU gets an expert once, however often it has it.

    Where copies pass an expert on, the nearest to its home comes first, so that it enters every group once.
    """
    ranks = hierarchy.num_ranks
    slot_E = torch.full((experts,), home.num_slots)
    held_S = home.expert_at_S
    is_expert_S = held_S < experts
    slot_E.scatter_reduce_(0, held_S[is_expert_S], torch.arange(home.num_slots)[is_expert_S], "amin")
    home_E = slot_E // home.per_rank(ranks)
    has_EG = held(placement, ranks)[:, :experts].T.clone()
    has_EG[torch.arange(experts), home_E] = False
    if relays_from is None:
        expert, target = has_EG.nonzero(as_tuple=True)
        return home_E[expert], target
    apart_EG = hierarchy.depth + 1 - separating_level(hierarchy)[home_E]  # 0: at home
    near_EG = (apart_EG * ranks + torch.arange(ranks)).masked_fill(~has_EG, ranks * (hierarchy.depth + 2))
    in_order_EG = near_EG.argsort(dim=1, stable=True)
    count_E = has_EG.sum(1)
    expert, number = (torch.arange(ranks) < count_E[:, None]).nonzero(as_tuple=True)
    target = in_order_EG[expert, number]
    before = in_order_EG[expert, (number - 1).clamp(min=0)]
    relayed = (number > 0) & (count_E[expert] >= relays_from)
    return torch.where(relayed, before, home_E[expert]), target
