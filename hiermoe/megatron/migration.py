"""Moves experts between ranks: weights, fp32 masters and optimizer moments, in place, between two steps."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from torch import Tensor

from hiermoe.routing.step import experts_per_rank
from hiermoe.topology.placement import Placement

BUFFER_BYTES = 2**25  # at most so much leaves a rank at once, and as much arrives


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


def check_optimizer(optimizer: MegatronOptimizer) -> None:
    """Refuse optimizers whose state of one expert is not at its rank.

    Raises:
        ValueError: names the optimizer.
    """
    for part in _parts(optimizer):
        if not isinstance(part, FP32Optimizer | Float16OptimizerWithFloat16Params):
            raise ValueError(
                f"{type(part).__name__} is not supported where experts move: only Megatron's FP32 and mixed-precision "
                "optimizers are (use_distributed_optimizer=False)"
            )


def state_tensors(parameter: torch.nn.Parameter, optimizer: MegatronOptimizer | None) -> Iterator[Tensor]:
    """Everything that must move with a parameter: itself, its fp32 master, and moments; the same order on all ranks.

    Raises:
        ValueError: the optimizer keeps something else of this parameter.
    """
    yield parameter.data
    if optimizer is None:
        return
    master = getattr(parameter, "main_param", None)
    if master is not None:
        yield master.data
    key = parameter if master is None else master
    for part in _parts(optimizer):
        state = part.optimizer.state
        if key in state:
            for name in sorted(state[key]):
                value = state[key][name]
                if not isinstance(value, Tensor) or value.dim() == 0:
                    continue  # a count of steps, the same for all
                if value.shape != parameter.shape:
                    raise ValueError(
                        f"{name} of shape {list(value.shape)} belongs to a parameter of shape {list(parameter.shape)}: "
                        "such optimizer state cannot be moved"
                    )
                yield value


def migrate(
    parameters: list[list[torch.nn.Parameter]],
    optimizer: MegatronOptimizer | None,
    old: Placement,
    new: Placement,
    group: dist.ProcessGroup,
) -> int:
    """Bring every expert of one layer from its old slot to its new one, in place.

    *Collective: every rank of the group must call it.* Experts move piece by piece, the same piece of all of them at
    once, in one message for every pair of ranks; so buffers stay small even if every expert moves.

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
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    per_rank = experts_per_rank(old.num_experts, size)
    moved = (old.slot_E != new.slot_E).nonzero().view(-1)
    if not len(moved):
        return 0
    from_slot, to_slot = old.slot_E[moved], new.slot_E[moved]
    leaving: dict[int, list[int]] = {}  # local slots by peer, experts by number: the order in which they travel
    arriving: dict[int, list[int]] = {}
    for source, target in zip(from_slot.tolist(), to_slot.tolist(), strict=True):
        if source // per_rank == rank:
            leaving.setdefault(target // per_rank, []).append(source % per_rank)
        if target // per_rank == rank:
            arriving.setdefault(source // per_rank, []).append(target % per_rank)
    states = [
        [_bytes_of(tensor) for parameter in expert for tensor in state_tensors(parameter, optimizer)]
        for expert in parameters
    ]
    busiest = int(torch.bincount(from_slot // per_rank).max())  # as many leave a rank as arrive there
    piece = max(1, BUFFER_BYTES // busiest)
    sent_bytes = 0
    for number, tensor in enumerate(states[0]):
        for start in range(0, len(tensor), piece):
            pieces = [expert[number][start : start + piece] for expert in states]
            sent_bytes += _exchange(pieces, leaving, arriving, rank, group)
    return sent_bytes


def _exchange(
    pieces: list[Tensor],
    leaving: dict[int, list[int]],
    arriving: dict[int, list[int]],
    rank: int,
    group: dist.ProcessGroup,
) -> int:
    """Move one piece of every moving expert; nothing is overwritten before all messages are there. *Collective.*

    Returns:
        Bytes sent over the wire.
    """
    outgoing = {
        peer: pieces[slots[0]] if len(slots) == 1 and peer != rank else torch.cat([pieces[slot] for slot in slots])
        for peer, slots in leaving.items()
    }
    incoming = {
        peer: outgoing[rank] if peer == rank else pieces[0].new_empty(len(slots) * len(pieces[0]))
        for peer, slots in arriving.items()
    }
    operations = [
        dist.P2POp(operation, buffer, dist.get_global_rank(group, peer), group)
        for operation, buffers in ((dist.isend, outgoing), (dist.irecv, incoming))
        for peer, buffer in sorted(buffers.items())
        if peer != rank
    ]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    for peer, slots in arriving.items():
        for slot, received in zip(slots, incoming[peer].split(len(pieces[0])), strict=True):
            pieces[slot].copy_(received)
    return sum(len(buffer) for peer, buffer in outgoing.items() if peer != rank)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _bytes_of(tensor: Tensor) -> Tensor:
    """The tensor's memory: uint8, one-dimensional."""
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {list(tensor.shape)} is not contiguous in memory: cannot move it in place")
    return tensor.view(-1).view(torch.uint8)
