"""What it costs to move experts from one placement to another."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hiermoe.planner.counts import separating_level
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import Peers
from hiermoe.topology.placement import Placement

WEIGHT_BYTES_PER_PARAMETER = 2  # bf16
STATE_BYTES_PER_PARAMETER = 14  # bf16 weight, fp32 master, two fp32 Adam moments


@dataclass(frozen=True)
class Migration:
    """Modelled cost of one change of placement in one layer.

    Attributes:
        moved_experts: experts whose GPU changes; a move inside a GPU costs nothing.
        moved_bytes: bytes that cross between GPUs, all experts together.
        link_ms: time at the bare rate of the busiest link, which all GPUs below it share.
        alltoall_ms: time at the per-GPU rate that the AlltoAll reaches there (1 / beta), at the busiest GPU.
    """

    moved_experts: int
    moved_bytes: int
    link_ms: float
    alltoall_ms: float


def price_migration(
    old: Placement, new: Placement, cluster: Cluster, expert_bytes: int, num_experts: int | None = None
) -> Migration:
    """Price the move of the experts that come to a GPU that did not have them, all at once.

    A copy comes from the one that the GPU's tokens used before. Without copies these are the experts that change GPU.

    Args:
        old: placement before.
        new: placement after.
        cluster: links and betas.
        expert_bytes: what moves with one expert.
        num_experts: E; the placements' numbers from there on are empty slots. None: there are none.
    """
    _, source, target = arrivals(old, new, cluster.hierarchy.num_ranks, num_experts)
    return price_transfers(source, target, cluster, expert_bytes)


def arrivals(
    old: Placement, new: Placement, num_ranks: int, num_experts: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Experts that come to a GPU that did not have them, each from which GPU to which: int64 [X] all three, by expert.

    Args:
        old: placement before.
        new: placement after.
        num_ranks: G.
        num_experts: as in :func:`price_migration`.
    """
    had_GE, has_GE = held(old, num_ranks), held(new, num_ranks)
    expert, target = (has_GE & ~had_GE)[:, :num_experts].T.nonzero(as_tuple=True)
    return expert, old.slots_of(expert[:, None], target)[:, 0] // old.per_rank(num_ranks), target


def price_transfers(source: Tensor, target: Tensor, cluster: Cluster, bytes_each: int) -> Migration:
    """Price things of one size that go from GPU to GPU, all at once.

    Args:
        source: int64 [X], GPU that each comes from.
        target: int64 [X], another GPU.
        cluster: links and betas.
        bytes_each: of one thing.
    """
    hierarchy = cluster.hierarchy
    ranks = hierarchy.num_ranks
    level = separating_level(hierarchy)[source, target]  # 1..D
    link_ms = 0.0
    for i, spec in enumerate(cluster.levels, start=1):
        crossing = level <= i  # leaves its group of level i
        ends = [end[crossing] // hierarchy.lanes(i) for end in (source, target)]
        busiest = max(int(torch.bincount(groups, minlength=hierarchy.U[i]).max()) for groups in ends)
        link_ms = max(link_ms, busiest * bytes_each / (spec.link_gb_per_s * 1e6))
    siblings = [cluster.constants(Peers.of_siblings(i, hierarchy)) for i in range(1, hierarchy.depth + 1)]
    beta = torch.tensor([constants.beta_ms_per_byte for constants in siblings], dtype=torch.float64)
    weight = beta[level - 1] * bytes_each
    busiest_ms = max(float(torch.bincount(ends, weight, ranks).max()) for ends in (source, target))
    count = len(source)
    return Migration(count, count * bytes_each, link_ms, busiest_ms)


def held(placement: Placement, num_ranks: int) -> Tensor:
    """Which GPU has which expert: bool [G, E]."""
    held_GE = torch.zeros(num_ranks, placement.num_experts, dtype=torch.bool)
    held_GE[torch.arange(placement.num_slots) // placement.per_rank(num_ranks), placement.expert_at_S] = True
    return held_GE
