"""What training keeps of an expert, and which rank holds which part of it: weights, fp32 masters, moments.

Without the distributed optimizer every replica of an expert holds all of them. With it, weights are held whole by each,
but each replica owns a range of a bucket that ignores where one parameter ends and the next begins; masters and moments
of what lies in it are there alone. Where parameters are gathered only while the next forward runs, weights too are
up to date there alone; elsewhere they are old until then.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from torch import Tensor

SUPPORTED = (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer)
_PRECISIONS = ("exp_avg_dtype", "exp_avg_sq_dtype", "main_params_dtype")  # of use_precision_aware_optimizer


class Range(NamedTuple):
    """Elements of a parameter, from ``low`` to before ``high``."""

    low: int
    high: int

    def of(self, other: "Range") -> "Range":
        """What both have; of no elements if ``high`` is not above ``low``."""
        return Range(max(self.low, other.low), max(self.low, other.low, min(self.high, other.high)))


@dataclass(frozen=True)
class Held:
    """One tensor of one parameter, of the experts in all local slots.

    Attributes:
        tensors: by slot: what this rank holds, one-dimensional; None where that is nothing.
        ranges: by slot and replica: the elements that each holds; None where every replica holds all.
    """

    tensors: Sequence[Tensor | None]
    ranges: Sequence[Sequence[Range]] | None

    def shared(self, window: Range, slot: int, other_slot: int, own: int) -> Iterator[tuple[int, Range]]:
        """What replica ``own`` has of a slot and each replica has of another one, of the elements in a window.

        What every replica holds, each exchanges with itself alone.
        """
        if self.ranges is None:
            yield own, window
            return
        here = window.of(self.ranges[slot][own])
        for replica, theirs in enumerate(self.ranges[other_slot]):
            part = here.of(theirs)
            if part.low < part.high:
                yield replica, part

    def bytes_of(self, slot: int, part: Range, own: int) -> Tensor:
        """Memory of some elements of a slot, which replica ``own``, this rank's, has: uint8."""
        tensor = self.tensors[slot]
        assert tensor is not None
        first = 0 if self.ranges is None else self.ranges[slot][own].low
        return tensor[part.low - first : part.high - first].view(torch.uint8)


class Replicas(NamedTuple):
    """Ranks that hold the experts of one layer.

    Attributes:
        ranks: global numbers, by replica and rank of the expert-parallel group.
        own: replica that this rank belongs to.
    """

    ranks: tuple[tuple[int, ...], ...]
    own: int


def replicas_of(
    parameter: torch.nn.Parameter, optimizer: MegatronOptimizer | None, ep_group: dist.ProcessGroup
) -> Replicas:
    """Those among which an expert's state is divided; without the distributed optimizer this rank's own alone.

    *Collective where the distributed optimizer is used: every rank must call it.*

    Args:
        parameter: of any expert.
        optimizer: whose state it is.
        ep_group: expert-parallel group.
    """
    own = tuple(dist.get_process_group_ranks(ep_group))
    buffers = [_buffer_of(parameter, part) for part in parts_of(optimizer) if isinstance(part, DistributedOptimizer)]
    group = next((buffer.data_parallel_group for buffer in buffers if buffer is not None), None)
    if group is None:
        return Replicas((own,), 0)
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, own, group=group)
    return Replicas(tuple(gathered), dist.get_rank(group))


def check_optimizer(optimizer: MegatronOptimizer) -> None:
    """Refuse optimizers whose state of an expert this module cannot find.

    Raises:
        ValueError: names the optimizer or its setting.
    """
    for part in parts_of(optimizer):
        if not isinstance(part, SUPPORTED):
            raise ValueError(f"{type(part).__name__} is not supported where experts move")
        if isinstance(part, DistributedOptimizer) and not getattr(part, "is_stub_optimizer", False):
            settings: Any = part.ddp_config
            if settings.use_megatron_fsdp:
                raise ValueError("use_megatron_fsdp is not supported where experts move")
            if part.config.optimizer_cpu_offload:
                raise ValueError("optimizer_cpu_offload is not supported where experts move")
            for name in _PRECISIONS:
                if getattr(part.config, name) in (torch.uint8, torch.float16):
                    raise ValueError(
                        f"{name}={getattr(part.config, name)}: state in fp8 or fp16 has a scale for each part of a "
                        "parameter: not supported where experts move; keep it in fp32 or bf16"
                    )


def parts_of(optimizer: MegatronOptimizer | None) -> list[MegatronOptimizer]:
    """The optimizers that one is made of."""
    if optimizer is None:
        return []
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def held_state(parameters: Sequence[torch.nn.Parameter], optimizer: MegatronOptimizer | None) -> list[Held]:
    """Everything that must move with one parameter of an expert; the same kinds in the same order on all ranks.

    What lies in the same memory comes in the order in which it must be written: whole weights, then those parts of them
    that this replica owns.

    Args:
        parameters: this parameter of the experts in all local slots.
        optimizer: None for weights alone.

    Raises:
        ValueError: the optimizer keeps something else of it, or a tensor is not contiguous.
    """
    held = [Held([_flat(parameter.data) for parameter in parameters], None)]
    for part in parts_of(optimizer):
        if isinstance(part, DistributedOptimizer) and _buffer_of(parameters[0], part) is not None:
            return [*held, *_divided(parameters, part)]
    return held + [Held([_flat(x) for x in tensors], None) for tensors in _undivided(parameters, optimizer)]


def gradients(parameters: Sequence[torch.nn.Parameter], optimizer: MegatronOptimizer | None) -> list[Held]:
    """The summed gradient of one parameter of the experts in all local slots, as `held_state`.

    Raises:
        ValueError: it is not where Megatron's DistributedDataParallel sums it.
    """
    if not all(hasattr(parameter, "main_grad") for parameter in parameters):
        raise ValueError(
            "experts travel beside a step only where gradients are summed in main_grad, as Megatron's DDP does"
        )
    flat: list[Tensor] = [_flat(parameter.main_grad) for parameter in parameters]  # type: ignore[attr-defined]
    for part in parts_of(optimizer):
        if isinstance(part, DistributedOptimizer) and _buffer_of(parameters[0], part) is not None:
            own = dist.get_rank(part.data_parallel_group)
            ranges = [_ranges(parameter, _buffer_of(parameter, part)) for parameter in parameters]
            return [Held([x[slice(*shares[own])] for x, shares in zip(flat, ranges, strict=True)], ranges)]
    return [Held(list(flat), None)]


def _undivided(parameters: Sequence[torch.nn.Parameter], optimizer: MegatronOptimizer | None) -> Iterator[list[Tensor]]:
    """Masters and moments, of which every replica holds all."""
    if optimizer is None:
        return
    masters = [getattr(parameter, "main_param", None) for parameter in parameters]
    keys = [parameter if master is None else master for parameter, master in zip(parameters, masters, strict=True)]
    if masters[0] is not None:
        yield [key.data for key in keys]
    for part in parts_of(optimizer):
        state = part.optimizer.state
        for name in _moments(state.get(keys[0], {}), parameters[0].shape):
            yield [state[key][name] for key in keys]


def _divided(parameters: Sequence[torch.nn.Parameter], part: DistributedOptimizer) -> Iterator[Held]:
    """What this replica owns: masters, or where the weights are their own masters these, and moments.

    The precision-aware optimizer steps the weights and keeps masters, or what they have beyond bf16 weights, beside
    the moments.
    """
    ranges = [_ranges(parameter, _buffer_of(parameter, part)) for parameter in parameters]
    keys = [_key(parameter, part) for parameter in parameters]
    first = next((key for key in keys if key is not None), None)
    if first is None:
        return  # other replicas own all of it, in every slot: nothing is sent from here or arrives
    settings: Any = part.ddp_config
    overlapped, has_masters = settings.overlap_param_gather, first.dtype != parameters[0].dtype
    if has_masters or overlapped:
        yield Held([None if key is None else _flat(key.data) for key in keys], ranges)
    if has_masters and overlapped:
        own = dist.get_rank(part.data_parallel_group)
        weights = [_flat(x.data)[slice(*shares[own])] for x, shares in zip(parameters, ranges, strict=True)]
        yield Held(weights, ranges)
    state = part.optimizer.state
    for name in _moments(state.get(first, {}), first.shape):
        yield Held([None if key is None else _flat(state[key][name]) for key in keys], ranges)


def _buffer_of(parameter: torch.nn.Parameter, part: DistributedOptimizer) -> Any:
    """Where its gradients are summed; None where another of the chained optimizers has it."""
    buffers = [] if getattr(part, "is_stub_optimizer", False) else part.buffers
    return next((buffer for buffer in buffers if parameter in buffer.param_index_map), None)


def _ranges(parameter: torch.nn.Parameter, buffer: Any) -> list[Range]:
    """The elements that each replica owns: its equal part of the bucket, cut to the parameter."""
    start, end, bucket_number = buffer.param_index_map[parameter]
    bucket, replicas = buffer.buckets[bucket_number], dist.get_world_size(buffer.data_parallel_group)
    size = bucket.grad_data.numel() // replicas
    whole = Range(0, end - start)
    firsts = [bucket.offset + replica * size - start for replica in range(replicas)]
    return [whole.of(Range(first, first + size)) for first in firsts]


def _key(parameter: torch.nn.Parameter, part: DistributedOptimizer) -> Tensor | None:
    """What the inner optimizer steps in its place; None where this replica owns nothing of it."""
    if parameter not in part.model_param_group_index_map:
        return None
    group, place = part.model_param_group_index_map[parameter]
    return part.optimizer.param_groups[group]["params"][place]


def _flat(tensor: Tensor) -> Tensor:
    """The tensor's memory, one-dimensional."""
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {list(tensor.shape)} is not contiguous in memory: cannot move it in place")
    return tensor.view(-1)


def _moments(state: dict[str, Any], shape: torch.Size) -> list[str]:
    """Names of what the optimizer keeps for every element.

    Raises:
        ValueError: it keeps something else.
    """
    names = []
    for name in sorted(state):
        value = state[name]
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue  # a count of steps, the same for all
        if value.shape != shape:
            raise ValueError(
                f"{name} of shape {list(value.shape)} belongs to a parameter of shape {list(shape)}: such optimizer "
                "state cannot be moved"
            )
        names.append(name)
    return names
