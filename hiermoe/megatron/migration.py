"""Moves experts between ranks: weights, fp32 masters and optimizer moments, in place, between two steps."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Migrated:
    """What one rank did for one layer.

    Attributes:
        sent_bytes: over the wire.
        moved_experts: of all ranks; those that changed only their slot included.
    """

    sent_bytes: int
    moved_experts: int


def expert_parameters(experts: torch.nn.Module, num_local_experts: int) -> list[list[torch.nn.Parameter]]:
    """Parameters of every local expert, in the same order for each.

    Raises:
        ValueError: experts whose parameters cannot be told apart.
    """
    local = getattr(experts, "local_experts", None)  # one module an expert
    if local is not None:
        return [list(expert.parameters()) for expert in local]
    numbered: list[list[torch.nn.Parameter]] = [[] for _ in range(num_local_experts)]
    for name, parameter in experts.named_parameters():  # grouped GEMM: weight0, weight1, ...
        number = re.search(r"(\d+)$", name)
        if number is None or int(number[1]) >= num_local_experts:
            raise ValueError(
                f"{type(experts).__name__} keeps several experts in one parameter ({name}): cannot move one"
            )
        numbered[int(number[1])].append(parameter)
    return numbered


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
    """Everything that must move with a parameter: itself, its fp32 master, and moments; the same order on all ranks."""
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
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    yield value


def migrate(
    parameters: list[list[torch.nn.Parameter]],
    optimizer: MegatronOptimizer | None,
    old: Placement,
    new: Placement,
    group: dist.ProcessGroup,
) -> Migrated:
    """Bring every expert of one layer from its old slot to its new one.

    *Collective: every rank of the group must call it.* One message for every pair of ranks that exchange experts;
    buffers hold the experts that move, nothing else. Nothing is overwritten before all messages have arrived.

    Args:
        parameters: of every local expert, by slot.
        optimizer: whose state moves too; None for weights alone.
        old: placement that the parameters are in.
        new: placement to reach.
        group: expert-parallel group.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    per_rank = experts_per_rank(old.num_experts, size)
    moved = (old.slot_E != new.slot_E).nonzero().view(-1)
    from_slot, to_slot = old.slot_E[moved].tolist(), new.slot_E[moved].tolist()
    tensors = {
        slot: [tensor for parameter in parameters[slot % per_rank] for tensor in state_tensors(parameter, optimizer)]
        for slot in {*from_slot, *to_slot}
        if slot // per_rank == rank
    }
    leaving: dict[int, list[int]] = {}  # by peer, experts by number
    arriving: dict[int, list[int]] = {}
    for source, target in zip(from_slot, to_slot, strict=True):
        if source // per_rank == rank:
            leaving.setdefault(target // per_rank, []).append(source)
        if target // per_rank == rank:
            arriving.setdefault(source // per_rank, []).append(target)
    outgoing = {peer: _packed([t for slot in slots for t in tensors[slot]]) for peer, slots in leaving.items()}
    incoming = {
        peer: outgoing[rank] if peer == rank else _empty_for([t for slot in slots for t in tensors[slot]])
        for peer, slots in arriving.items()
    }
    operations = [
        dist.P2POp(dist.isend, buffer, dist.get_global_rank(group, peer), group)
        for peer, buffer in sorted(outgoing.items())
        if peer != rank
    ] + [
        dist.P2POp(dist.irecv, buffer, dist.get_global_rank(group, peer), group)
        for peer, buffer in sorted(incoming.items())
        if peer != rank
    ]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    for peer, slots in arriving.items():
        _unpack(incoming[peer], [tensor for slot in slots for tensor in tensors[slot]])
    sent_bytes = sum(buffer.numel() for peer, buffer in outgoing.items() if peer != rank)
    return Migrated(sent_bytes, len(moved))


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _packed(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def _empty_for(tensors: list[Tensor]) -> Tensor:
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return torch.empty(num_bytes, dtype=torch.uint8, device=tensors[0].device)


def _unpack(buffer: Tensor, tensors: list[Tensor]) -> None:
    start = 0
    for tensor in tensors:
        end = start + tensor.numel() * tensor.element_size()
        # A copy, because a view as another type must start at a multiple of its size.
        tensor.copy_(buffer[start:end].clone().view(tensor.dtype).view_as(tensor))
        start = end
