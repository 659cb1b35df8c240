"""Moves experts between ranks: weights, fp32 masters and optimizer moments, in place, between two steps."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from hiermoe.megatron.expert_state import Held, Range, Replicas, held_state, replicas_of
from hiermoe.routing.step import experts_per_rank
from hiermoe.topology.placement import Placement

BUFFER_BYTES = 2**25  # at most so much leaves a rank at once, and as much arrives
_ELEMENT_BYTES = 32  # at most, of one element of a weight with its master and moments


class _Move(NamedTuple):
    """One expert's way, by ranks of the expert-parallel group and local slots."""

    source: int
    source_slot: int
    target: int
    target_slot: int


def expert_parameters(experts: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    """Parameters of every local expert, in the same order for each.

    Raises:
        ValueError: experts whose parameters cannot be told apart.
    """
    local = getattr(experts, "local_experts", None)
    if local is None:
        raise ValueError(
            f"{type(experts).__name__} keeps its experts together: only SequentialMLP's can be moved "
            "(moe_grouped_gemm=False)"
        )
    return [list(expert.parameters()) for expert in local]


def migrate(
    parameters: list[list[torch.nn.Parameter]],
    optimizer: MegatronOptimizer | None,
    old: Placement,
    new: Placement,
    group: dist.ProcessGroup,
) -> int:
    """Bring every expert of one layer from its old slot to its new one, in place.

    *Collective: every rank of the group, and of the groups of its replicas, must call it.* Experts move piece by
    piece, the same elements of all of them at once, in one message for every pair of ranks; so buffers stay small even
    if every expert moves. What the distributed optimizer has divided among replicas goes from the replica that owns it
    here to the one that owns it there.

    Args:
        parameters: of every local expert, by slot.
        optimizer: whose state moves too; None for weights alone.
        old: placement that the parameters are in.
        new: placement to reach.
        group: expert-parallel group.

    Returns:
        Bytes that this rank sent over the wire.

    Raises:
        ValueError: state that cannot be moved; nothing has been then.
    """
    per_rank = experts_per_rank(old.num_experts, dist.get_world_size(group))
    moved = (old.slot_E != new.slot_E).nonzero().view(-1)
    if not len(moved):
        return 0
    moves = [
        _Move(*divmod(source, per_rank), *divmod(target, per_rank))
        for source, target in zip(old.slot_E[moved].tolist(), new.slot_E[moved].tolist(), strict=True)
    ]
    held = [held_state(same, optimizer) for same in zip(*parameters, strict=True)]
    replicas = replicas_of(parameters[0][0], optimizer, group)
    over = group if len(replicas.ranks) == 1 else dist.group.WORLD
    busiest = int(torch.bincount(old.slot_E[moved] // per_rank).max())  # as many leave a rank as arrive there
    piece = max(1, BUFFER_BYTES // (_ELEMENT_BYTES * busiest))
    sent_bytes = 0
    for parameter, tensors in zip(parameters[0], held, strict=True):
        for start in range(0, parameter.numel(), piece):
            window = Range(start, min(start + piece, parameter.numel()))
            sent_bytes += _exchange(window, tensors, moves, replicas, over)
    return sent_bytes


def _exchange(
    window: Range, held: list[Held], moves: list[_Move], replicas: Replicas, group: dist.ProcessGroup | None
) -> int:
    """Move some elements of a parameter of every moving expert; nothing is overwritten before all messages are there.

    *Collective.*

    Returns:
        Bytes sent over the wire.
    """
    rank, own = dist.get_rank(), replicas.own
    here = replicas.ranks[own].index(rank)
    leaving: dict[int, list[Tensor]] = {}  # by peer, experts by number, then tensors: the order in which they travel
    arriving: dict[int, list[tuple[int, Tensor]]] = {}  # with the number of the tensor
    for move in moves:
        for number, tensor in enumerate(held):
            if move.source == here:
                for replica, part in tensor.shared(window, move.source_slot, move.target_slot, own):
                    peer = replicas.ranks[replica][move.target]
                    leaving.setdefault(peer, []).append(tensor.bytes_of(move.source_slot, part, own))
            if move.target == here:
                for replica, part in tensor.shared(window, move.target_slot, move.source_slot, own):
                    peer = replicas.ranks[replica][move.source]
                    arriving.setdefault(peer, []).append((number, tensor.bytes_of(move.target_slot, part, own)))
    outgoing = {
        peer: parts[0] if len(parts) == 1 and peer != rank else torch.cat(parts) for peer, parts in leaving.items()
    }
    incoming = {
        peer: outgoing[rank] if peer == rank else parts[0][1].new_empty(sum(len(part) for _, part in parts))
        for peer, parts in arriving.items()
    }
    operations = [
        dist.P2POp(operation, buffer, peer, group)
        for operation, buffers in ((dist.isend, outgoing), (dist.irecv, incoming))
        for peer, buffer in sorted(buffers.items())
        if peer != rank
    ]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    writes = [
        (number, part, received)
        for peer, parts in arriving.items()
        for (number, part), received in zip(parts, incoming[peer].split([len(x) for _, x in parts]), strict=True)
    ]
    for _, part, received in sorted(writes, key=lambda write: write[0]):
        part.copy_(received)
    return sum(len(buffer) for peer, buffer in outgoing.items() if peer != rank)
