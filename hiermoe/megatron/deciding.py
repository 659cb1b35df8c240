"""Who decides on a layer's placement, and how all other ranks learn it.

Deciding costs more than anything else that a policy does, and every rank would find the same. So layers are divided
among ranks where a policy allows it (:meth:`PlacementPolicy.shared_state`): one rank decides on a layer, and it alone
keeps what the policy remembers. Measurements of all layers are summed in one collective. One small reduction tells
whose decisions there are to hear, and whether ranks that decided on the same layer agree.
"""

import hashlib
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hiermoe.dispatch.communicators import reduced
from hiermoe.megatron.layer_placement import LayerPlacement
from hiermoe.policies.protocol import PlacementUpdate
from hiermoe.records.status import NotApplicable

T = TypeVar("T")


class _Failed(NamedTuple):
    """The one rank that was to decide on a layer could not."""

    kind: type[Exception]
    words: str
    where: str

    @classmethod
    def of(cls, error: Exception, layer: LayerPlacement) -> "_Failed":
        # What callers tell apart: a combination without meaning, bad input, and everything else.
        kind = next((kind for kind in (NotApplicable, ValueError) if isinstance(error, kind)), RuntimeError)
        named = "" if kind is not RuntimeError else f"{type(error).__name__}: "
        rank = dist.get_rank()
        return cls(kind, f"layer {layer.number}, decided on by rank {rank}: {named}{error}", traceback.format_exc())

    def error(self) -> Exception:
        error = self.kind(self.words)
        error.add_note(self.where)
        return error


class _Said(NamedTuple):
    """By the one rank that decided on a layer: what the others must know."""

    update: PlacementUpdate | None
    shared_state: dict[str, Tensor]


def decide(layers: Mapping[int, LayerPlacement], group: dist.ProcessGroup) -> dict[int, PlacementUpdate]:
    """Decide on the placements of some layers. *Collective: every rank of the group must call it.*

    Args:
        layers: by their place among all layers of these ranks, which says who decides; the same on every rank.
        group: ranks that have these layers.

    Returns:
        The updates, of layers that had one, by place; the same on every rank.

    Raises:
        ValueError: on every rank, as all others here: a policy makes copies where layers keep none, or refuses.
        NotApplicable: a policy cannot decide.
        RuntimeError: ranks decided differently, or the rank that decides on a layer failed in another way.
    """
    sums = _summed(layers, group)
    updates: dict[int, PlacementUpdate] = {}
    said: dict[int, _Said | _Failed] = {}
    for place, layer in layers.items():
        before = layer.policy.shared_state()
        if before is None:
            update = _decided(layer, sums.get(place))
            if update is not None:
                updates[place] = update
        elif _is_mine(place, group):
            try:
                update = _decided(layer, sums.get(place))
            except Exception as error:  # the others wait to hear of it
                said[place] = _Failed.of(error, layer)
                continue
            after = layer.policy.shared_state()
            assert after is not None
            if update is not None or not _equal(before, after):
                said[place] = _Said(update, after)
    alike = [(layers[place].number, update.placement.key.hex()) for place, update in updates.items()]
    spoken = check_same(alike, group, [int(place in said) for place in layers])
    speakers = {_decider(place, group) for place, one in zip(layers, spoken, strict=True) if one}
    heard = {rank: _broadcast(said, rank, group) for rank in sorted(speakers)}
    for words in heard.values():
        for place, one in words.items():
            if isinstance(one, _Failed):
                raise one.error()
            if place not in said:
                layers[place].policy.load_state_dict(one.shared_state)
            if one.update is not None:
                updates[place] = one.update
    return {place: updates[place] for place in layers if place in updates}


def policy_states(layers: Sequence[LayerPlacement], group: Callable[[], dist.ProcessGroup]) -> list[dict[str, Tensor]]:
    """What the policies of all layers remember, from the ranks that decide. *Collective where one decides for all.*

    Args:
        layers: all of these ranks.
        group: that they decide in; asked for only where something is exchanged.
    """
    states = []
    for place, layer in enumerate(layers):
        state = layer.policy.state_dict()
        if layer.policy.shared_state() is not None:
            state = _broadcast(state, _decider(place, group()), group())
        states.append(state)
    return states


def check_same(decision: Any, group: dist.ProcessGroup, flags: Sequence[int] = ()) -> list[int]:
    """Compare a hash of a decision, in what JSON can say, over the ranks. *Collective.*

    Args:
        decision: of this rank.
        group: ranks that must have decided the same.
        flags: of this rank, as many on each.

    Returns:
        The highest of each flag.

    Raises:
        RuntimeError: on every rank, if they differ.
    """
    number = int.from_bytes(hashlib.sha256(json.dumps(decision).encode()).digest()[:4], "big")
    highest = reduced(torch.tensor([number, -number, *flags]), dist.ReduceOp.MAX, group).tolist()
    if highest[:2] != [number, -number]:
        raise RuntimeError("ranks decided on different placements: their routing statistics or versions differ")
    return highest[2:]


def _decider(place: int, group: dist.ProcessGroup) -> int:
    """Rank in the group that decides on a layer."""
    return place % dist.get_world_size(group)


def _broadcast(words: T, rank: int, group: dist.ProcessGroup) -> T:
    """What a rank of the group says. *Collective.*"""
    said = [words]
    dist.broadcast_object_list(said, src=dist.get_global_rank(group, rank), group=group)
    return said[0]


def _is_mine(place: int, group: dist.ProcessGroup) -> bool:
    return _decider(place, group) == dist.get_rank(group)


def _summed(layers: Mapping[int, LayerPlacement], group: dist.ProcessGroup) -> dict[int, tuple[Tensor, Tensor]]:
    """Over all ranks what each layer measured, and the schemes that they used; of layers that measured anything."""
    measured = {place: layer.measured for place, layer in layers.items() if layer.measured is not None}
    if not measured:
        return {}
    parts = {
        place: torch.cat([own.reshape(-1), layers[place].votes().to(own.dtype)]) for place, own in measured.items()
    }
    total = reduced(torch.cat(list(parts.values())), dist.ReduceOp.SUM, group)
    found = {}
    for (place, own), part in zip(measured.items(), total.split([len(x) for x in parts.values()]), strict=True):
        stats, votes = part.split([own.numel(), len(part) - own.numel()])
        found[place] = stats.view_as(own), votes
    return found


def _decided(layer: LayerPlacement, summed: tuple[Tensor, Tensor] | None) -> PlacementUpdate | None:
    """What a layer's policy decides.

    Raises:
        ValueError: it makes copies where the layer keeps none.
    """
    stats, votes = summed or (None, None)
    update = layer.policy.decide(stats, layer.dispatcher.placement, layer.context(votes))
    if update is not None and update.placement.has_copies and not layer.keeps_copies:
        raise ValueError(f"layer {layer.number}: training moves experts, but sums no gradients of copies")
    return update


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
