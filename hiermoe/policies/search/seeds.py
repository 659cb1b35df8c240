"""Starts for a search: Mt-KaHyPar partitions of the experts, level by level from the outermost in.

Connectivity over the groups of a level, summed over tokens, is the level's traffic; it ignores which group is the
busiest, so exact swaps follow. Two inputs for the same partitioner:

``pairs``: the graph of co-activations of all tokens, a few thousand edges however many tokens there are. It minimises
the pairs of a token's experts that are apart, which is near connectivity where no structure is larger than pairs.
``sets``: the hypergraph of the expert sets of a few thousand tokens, which minimises connectivity itself.

Gottesbueren et al., Mt-KaHyPar (ALENEX 2021); deterministic preset, one thread. Its mapping mode (Steiner
trees on the topology) was not done after three minutes for 8192 sets of 8 over 32 GPUs, so levels are cut one by one.
"""

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hiermoe.planner.token_sets import TokenSets
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement

SeedKind = Literal["pairs", "sets"]
IMBALANCE = 0.03  # what the partitioner may leave to be repaired; without any slack it can hardly move a vertex


@lru_cache(maxsize=1)
def _partitioner() -> tuple[Any, Any]:
    """The module and its one initializer.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import mtkahypar
    except ImportError as error:
        raise ValueError(
            "the placement search needs Mt-KaHyPar (pip install 'mtkahypar>=1.7'; PyPI has it for CPython 3.9 to 3.14 "
            f"on 64-bit Linux and on macOS): {error}"
        ) from error
    return mtkahypar, mtkahypar.initialize(1)


def partition_experts(sets: TokenSets, hierarchy: Hierarchy, kind: SeedKind, seed: int) -> Placement:
    """A placement whose groups, at every level, hold experts that fire together.

    Args:
        sets: all tokens for ``pairs``; for ``sets`` a sample of a few thousand.
        hierarchy: groups of GPUs.
        kind: what is partitioned.
        seed: of the partitioner.

    Returns:
        Exactly E/G experts a GPU; the same for the same arguments.

    Raises:
        ValueError: the partitioner is not installed.
    """
    content = hashlib.sha256(sets.ids_NK.numpy().tobytes() + sets.weight_N.numpy().tobytes()).digest()
    return _partitioned(_Question(content, sets.num_experts, hierarchy, kind, seed, sets))


@dataclass(frozen=True)
class _Question:
    """What a partition depends on; sets are equal by their content."""

    content: bytes
    num_experts: int
    hierarchy: Hierarchy
    kind: SeedKind
    seed: int
    sets: TokenSets = field(compare=False)


@lru_cache(maxsize=4)  # where a short trace goes round, one search after another sees the same sets
def _partitioned(question: _Question) -> Placement:
    sets, hierarchy, kind, seed = question.sets, question.hierarchy, question.kind, question.seed
    weight_EE = sets.coactivation()
    blocks = [np.arange(sets.num_experts)]
    for outer, groups in zip(hierarchy.U, hierarchy.groups, strict=False):
        fan_out = groups // outer
        blocks = [part for block in blocks for part in _split(block, fan_out, sets, weight_EE, kind, seed)]
    slot_E = torch.empty(sets.num_experts, dtype=torch.int64)
    slot_E[torch.from_numpy(np.concatenate(blocks))] = torch.arange(sets.num_experts)
    return Placement.of_slots(slot_E)


def _split(
    block: np.ndarray, parts: int, sets: TokenSets, weight_EE: Tensor, kind: SeedKind, seed: int
) -> list[np.ndarray]:
    """Cut a block of experts into equal parts."""
    inside = weight_EE[block][:, block]
    if parts == 1 or parts == len(block) or not bool(inside.any()):
        return np.split(block, parts)
    mtkahypar, initializer = _partitioner()
    mtkahypar.set_seed(seed)
    context = initializer.context_from_preset(mtkahypar.PresetType.DETERMINISTIC)
    context.logging = False
    ones = [1] * len(block)
    if kind == "pairs":
        context.set_partitioning_parameters(parts, IMBALANCE, mtkahypar.Objective.CUT)
        upper = torch.triu(inside).nonzero()
        weight = inside[upper[:, 0], upper[:, 1]].tolist()
        edges = [(a, b) for a, b in upper.tolist()]
        graph = initializer.create_graph(context, len(block), len(edges), edges, ones, weight)
    else:
        context.set_partitioning_parameters(parts, IMBALANCE, mtkahypar.Objective.KM1)
        edges, weight = _hyperedges(sets, block)
        graph = initializer.create_hypergraph(context, len(block), len(edges), edges, ones, weight)
    part_B = np.array(graph.partition(context).get_partition())
    part_B = even(part_B, parts, inside.numpy())
    return [block[part_B == part] for part in range(parts)]


def _hyperedges(sets: TokenSets, block: np.ndarray) -> tuple[list[list[int]], list[int]]:
    """What the block's experts have of each set: those with two or more, equal ones merged."""
    place_E = np.full(sets.num_experts, len(block))
    place_E[block] = np.arange(len(block))
    rows = np.sort(place_E[sets.ids_NK.numpy()], axis=1)  # experts outside the block stand last
    several = (rows < len(block)).sum(1) >= 2
    unique, inverse = np.unique(rows[several], axis=0, return_inverse=True)
    weight = np.bincount(inverse.ravel(), weights=sets.weight_N.numpy()[several], minlength=len(unique))
    edges = [row[:size] for row, size in zip(unique.tolist(), (unique < len(block)).sum(1).tolist(), strict=True)]
    return edges, weight.astype(int).tolist()


def even(part_B: np.ndarray, parts: int, weight_BB: np.ndarray) -> np.ndarray:
    """Move the fewest experts that make all parts equal, each time the one that loses least.

    Args:
        part_B: integer [B], part of each vertex.
        parts: number of parts; divides B.
        weight_BB: [B, B], what two vertices of one part are worth.

    Returns:
        int [B].
    """
    part_B, size = part_B.copy(), len(part_B) // parts
    while True:
        count = np.bincount(part_B, minlength=parts)
        under = np.flatnonzero(count < size)
        if not len(under):
            return part_B
        movable = np.flatnonzero(count[part_B] > size)
        to_part = np.stack([weight_BB[:, part_B == part].sum(1) for part in range(parts)], axis=1)
        gain = to_part[movable][:, under] - to_part[movable, part_B[movable]][:, None]
        vertex, part = np.unravel_index(int(gain.argmax()), gain.shape)
        part_B[movable[vertex]] = under[part]
