"""Moves experts between ranks: weights, fp32 masters and optimizer moments, in place.

Between two steps (`migrate`), or beside the forward and backward passes of one (`Travelling`).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from hiermoe.dispatch.messages import Message, Piece
from hiermoe.megatron.expert_state import Held, Range, Replicas, gradients, held_state, replicas_of
from hiermoe.routing.step import experts_per_rank
from hiermoe.topology.placement import Placement

BUFFER_BYTES = 2**25  # at most so much leaves a rank at once, and as much arrives
_GROUPED = re.compile(r"linear_fc[12]\.(?:weight|bias)(\d+)")  # parameters of TEGroupedMLP
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
    local: Any = getattr(experts, "local_experts", None)
    if local is not None:  # SequentialMLP
        return [list(expert.parameters()) for expert in local]
    numbered = {name: _GROUPED.fullmatch(name) for name, _ in experts.named_parameters()}
    if not numbered or not all(numbered.values()):
        raise ValueError(
            f"{type(experts).__name__} keeps its experts together: only SequentialMLP's, and TEGroupedMLP's with a "
            "parameter for each expert, can be moved"
        )
    found: dict[int, list[torch.nn.Parameter]] = {}
    for name, parameter in experts.named_parameters():
        match = numbered[name]
        assert match is not None
        found.setdefault(int(match[1]), []).append(parameter)
    return [found[slot] for slot in range(len(found))]


def migrate(
    parameters: list[list[torch.nn.Parameter]],
    optimizer: MegatronOptimizer | None,
    old: Placement,
    new: Placement,
    group: dist.ProcessGroup,
    state_of: Callable[[Sequence[torch.nn.Parameter], MegatronOptimizer | None], list[Held]] = held_state,
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
        state_of: what moves of a parameter: all that training keeps, or its gradient.

    Returns:
        Bytes that this rank sent over the wire.

    Raises:
        ValueError: state that cannot be moved; nothing has been then.
    """
    sent_bytes = 0
    for message in _messages(parameters, optimizer, old, new, group, state_of):
        sent_bytes += message().finish()
    return sent_bytes


class Travelling:
    """Experts of one layer on their way to new slots, while training goes on from where they were.

    What it sends must not change before `finish`: it is read while it travels. Arrived pieces wait in memory of their
    own until then.
    """

    def __init__(
        self,
        parameters: list[list[torch.nn.Parameter]],
        optimizer: MegatronOptimizer,
        old: Placement,
        new: Placement,
        group: dist.ProcessGroup,
        over: dist.ProcessGroup,
    ) -> None:
        """Begin to send; see `migrate`. *Collective.* Returns before anything has arrived.

        Args:
            parameters: of every local expert, by slot.
            optimizer: whose state moves too.
            old: placement that the parameters are in.
            new: placement to reach.
            group: expert-parallel group.
            over: a process group of all ranks that hold replicas of these experts, which nothing else sends over.
        """
        for same in zip(*parameters, strict=True):
            gradients(same, optimizer)  # which must be movable too, and that shows now
        self.old, self.new = old, new
        self._parameters, self._optimizer, self._group = parameters, optimizer, group
        self._begun = [message() for message in _messages(parameters, optimizer, old, new, group, held_state, over)]

    def finish(self) -> int:
        """Wait for all of it and put it in its place, and the gradients of this step after it. *Collective.*

        Call it after the backward passes and before the optimizer's step: until then nothing that was sent has
        changed, and from then on the new places' optimizers step it, with the gradients that the old places summed.

        Returns:
            Bytes that this rank sent over the wire.
        """
        sent_bytes = sum(message.finish() for message in self._begun)
        return sent_bytes + migrate(self._parameters, self._optimizer, self.old, self.new, self._group, gradients)

    def abandon(self) -> None:
        """Wait for all of it, and let it go: experts stay where they are. *Collective.*"""
        for message in self._begun:
            message.wait()


def bytes_on_the_way(parameters: list[list[torch.nn.Parameter]], old: Placement, new: Placement, ranks: int) -> int:
    """At most so many bytes does `Travelling` keep at a rank, arriving and leaving: the same on every rank."""
    per_rank = experts_per_rank(old.num_experts, ranks)
    moved = old.slot_E != new.slot_E
    busiest = int(torch.bincount(new.slot_E[moved] // per_rank, minlength=1).max())
    return 2 * busiest * _ELEMENT_BYTES * sum(parameter.numel() for parameter in parameters[0])


def _messages(
    parameters: list[list[torch.nn.Parameter]],
    optimizer: MegatronOptimizer | None,
    old: Placement,
    new: Placement,
    group: dist.ProcessGroup,
    state_of: Callable[[Sequence[torch.nn.Parameter], MegatronOptimizer | None], list[Held]],
    over: dist.ProcessGroup | None = None,
) -> Iterator[Callable[[], Message]]:
    """What begins each piece of a migration, in order. *Collective.*"""
    per_rank = experts_per_rank(old.num_experts, dist.get_world_size(group))
    moved = (old.slot_E != new.slot_E).nonzero().view(-1)
    if not len(moved):
        return
    moves = [
        _Move(*divmod(source, per_rank), *divmod(target, per_rank))
        for source, target in zip(old.slot_E[moved].tolist(), new.slot_E[moved].tolist(), strict=True)
    ]
    held = [state_of(same, optimizer) for same in zip(*parameters, strict=True)]
    replicas = replicas_of(parameters[0][0], optimizer, group)
    if over is None and len(replicas.ranks) == 1:
        over = group
    busiest = int(torch.bincount(old.slot_E[moved] // per_rank).max())  # as many leave a rank as arrive there
    piece = max(1, BUFFER_BYTES // (_ELEMENT_BYTES * busiest))
    for parameter, tensors in zip(parameters[0], held, strict=True):
        for start in range(0, parameter.numel(), piece):
            window = Range(start, min(start + piece, parameter.numel()))
            yield partial(_begin, window, tensors, moves, replicas, over)


def _begin(
    window: Range, held: list[Held], moves: list[_Move], replicas: Replicas, group: dist.ProcessGroup | None
) -> Message:
    """Send some elements of a parameter of every moving expert; nothing is overwritten yet. *Collective.*"""
    rank, own = dist.get_rank(), replicas.own
    here = replicas.ranks[own].index(rank)
    leaving: dict[int, list[Tensor]] = {}  # by peer, experts by number, then tensors: the order in which they travel
    arriving: dict[int, list[Piece]] = {}  # with the number of the tensor
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
    return Message.begin(leaving, arriving, group)
