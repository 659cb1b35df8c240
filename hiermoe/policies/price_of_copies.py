"""What copies of experts cost in a step: weights sent to them, gradients sent home, memory of their slots."""

from dataclasses import dataclass

import torch

from hiermoe.model import LayerSizes
from hiermoe.policies.price_of_moving import (
    STATE_BYTES_PER_PARAMETER,
    WEIGHT_BYTES_PER_PARAMETER,
    Migration,
    price_transfers,
)
from hiermoe.policies.protocol import CopyTerms
from hiermoe.policies.ways_of_copies import part_of_expert, ways_of_copies
from hiermoe.topology.cluster import Cluster
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
        parameters, own = per_rank * part_of_expert(parameters, ranks), 0  # from each other GPU, for all slots
    else:
        ways = ways_of_copies(placement, home, cluster.hierarchy, terms.relays_from, experts)
        source, target = ways.source_X, ways.target_X
        own = -(-experts // ranks)
    sends = 2 if terms.shared_buffers else 1
    sent_bytes = terms.gradient_bytes if terms.with_state else sends * WEIGHT_BYTES_PER_PARAMETER
    weights = price_transfers(source, target, cluster, sent_bytes * parameters)
    gradients = price_transfers(target, source, cluster, terms.gradient_bytes * parameters)
    layers = 1 if terms.shared_buffers else sizes.num_layers or float("nan")
    kept_bytes = STATE_BYTES_PER_PARAMETER if terms.with_state else WEIGHT_BYTES_PER_PARAMETER
    slot_bytes = (kept_bytes + terms.gradient_bytes) * sizes.expert_parameters
    return CopyCost(weights, gradients, (per_rank - own) * slot_bytes * layers / 1e9)
