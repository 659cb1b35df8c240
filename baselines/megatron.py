"""Megatron-LM's AlltoAll dispatcher, described.

Source: ``megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher``. It permutes to one row per
(token, expert) and exchanges them in one uneven AlltoAll over all GPUs of the expert-parallel group.
"""

from hiermoe.planner.scheme import DispatchScheme, Stage
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import WORLD


def alltoall(hierarchy: Hierarchy) -> tuple[DispatchScheme, ...]:
    """One AlltoAll over the world, a row per (token, expert)."""
    return (DispatchScheme("megatron", (Stage(WORLD, "pair"),)),)
