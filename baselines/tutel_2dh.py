"""Tutel's two-dimensional hierarchical AlltoAll (Hwang et al., MLSys 2023), written from its published description.

Two exchanges, inside the node and between nodes, without deduplication. The order decides who is loaded: intra-first
sends a row to the GPU of its own node that has the destination's local index, then across; inter-first sends it to its
own local index on the destination's node, then inside. Tutel's splits are equal, so its tensors are padded per
(source, expert); the HierMoE paper does not say how its authors set this, hence all variants.
"""

from hiermoe.planner.scheme import DispatchScheme, Padding, Stage
from hiermoe.records.status import NotApplicable
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import Peers


def two_dimensional(
    hierarchy: Hierarchy, intra_first: bool = True, capacity_factor: float | None = None
) -> tuple[DispatchScheme, ...]:
    """2DH on level 1 of the hierarchy.

    Args:
        hierarchy: its level 1 splits GPUs into the nodes (on one node: into its halves).
        intra_first: the order of the paper and of Tutel's overlapped path; false is Tutel's default path.
        capacity_factor: None: uneven splits without padding. 0: padded to the largest count. Above 0: padded to the
            capacity, what exceeds it is dropped.

    Raises:
        NotApplicable: a hierarchy of one level.
        ValueError: a negative capacity factor.
    """
    if hierarchy.depth < 2:
        raise NotApplicable(f"Tutel's 2DH needs two levels, the hierarchy has {hierarchy.depth}")
    inter, intra = (Stage(Peers(kind, 1), "pair") for kind in ("inter", "intra"))
    stages = (intra, inter) if intra_first else (inter, intra)
    name = "tutel_2dh" if intra_first else "tutel_2dh_interfirst"
    if capacity_factor is None:
        return (DispatchScheme(name, stages),)
    return (DispatchScheme(f"{name}_padded_cf{capacity_factor:g}", stages, Padding(capacity_factor)),)
