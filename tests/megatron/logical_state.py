"""What training goes on from, in logical order: the same whichever ranks hold which part of it.

Names are made here, from Megatron's layers, attributes of parameters and where a placement has the experts; Megatron's
own checkpointing, which tests compare with this, is not asked.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.megatron.parallel_model import EXPERTS, ParallelModel

_EXPERT = re.compile(r"(?P<layer>.*\.mlp)\.experts\.(?:local_experts\.(?P<one>\d+)\.)?(?P<rest>.*?)(?P<grouped>\d*)$")
_LAYER = re.compile(r"(decoder\.layers)\.(\d+)\.")


class Piece(NamedTuple):
    """Some elements of one tensor.

    Attributes:
        name: with the kind: weight, param (a master), exp_avg or exp_avg_sq.
        shape: of the tensor-parallel rank's part that they are of.
        start: their first one's place in it.
        values: one-dimensional.
        part: which one of how many tensor-parallel ranks.
        parts: see above.
        axis: that these divide.
        gated: gate and up are divided each.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    part: int
    parts: int
    axis: int
    gated: bool


def pieces(model: ParallelModel) -> list[Piece]:
    """Those that this rank has."""
    from megatron.core import parallel_state

    found = []
    for chunk in model.chunks:
        modules = dict(chunk.named_modules())
        for stock_name, parameter in chunk.named_parameters():
            name = _name(stock_name, modules)
            divided: Any = getattr(parameter, "tensor_model_parallel", False) and ".experts." not in name
            place = (0, 1, 0)
            if divided:
                size = parallel_state.get_tensor_model_parallel_world_size()
                axis: Any = parameter.partition_dim  # type: ignore[attr-defined]
                place = (parallel_state.get_tensor_model_parallel_rank(), size, axis)
            gated = divided and "linear_fc1" in name
            for kind, start, values in _states(parameter, model):
                found.append(
                    Piece(f"{name} {kind}", tuple(parameter.shape), start, values.detach().clone(), *place, gated)
                )
    return found


def _name(name: str, modules: dict[str, Any]) -> str:
    """Of the whole model: layers by Megatron's number, experts by the router's."""
    from megatron.core import parallel_state

    match = _EXPERT.match(name)
    if match is not None:
        dispatcher = modules[match["layer"]].token_dispatcher
        slots = EXPERTS // parallel_state.get_expert_model_parallel_world_size()
        slot = parallel_state.get_expert_model_parallel_rank() * slots + int(match["one"] or match["grouped"])
        placed = getattr(dispatcher, "dispatcher", None)
        expert = slot if placed is None else int(placed.placement.expert_at_S[slot])
        name = f"{match['layer']}.experts.{expert}.{match['rest']}"
    layer = _LAYER.search(name)
    if layer is None:
        return name
    number = modules[name[: layer.end() - 1]].layer_number
    return f"{name[: layer.start()]}{layer[1]}.{number}.{name[layer.end() :]}"


def _states(parameter: torch.nn.Parameter, model: ParallelModel) -> Iterator[tuple[str, int, Tensor]]:
    """Kind, first element and elements of all that this rank has of a parameter."""
    yield "weight", 0, parameter.data.view(-1)
    for part in model.optimizer.chained_optimizers:  # type: ignore[attr-defined]
        if getattr(part, "is_stub_optimizer", False):
            continue
        if not hasattr(part, "model_param_gbuf_map"):
            state = part.optimizer.state.get(parameter, {})
            yield from ((kind, 0, state[kind].view(-1)) for kind in ("exp_avg", "exp_avg_sq") if kind in state)
        elif parameter in part.model_param_gbuf_map:
            start = part._get_model_param_range_map(parameter)["param"].start
            for kind, values in part._get_main_param_and_optimizer_states(parameter).items():
                if values.dim():
                    yield kind, start, values.view(-1)


def assembled(ranks: list[list[Piece]]) -> dict[str, Tensor]:
    """Whole tensors of the whole model; every element is there, and is the same wherever it is held twice."""
    flat: dict[tuple[str, int], Tensor] = {}
    of_name: dict[str, Piece] = {}
    for piece in (piece for rank in ranks for piece in rank):
        empty = torch.full((torch.Size(piece.shape).numel(),), torch.nan, dtype=piece.values.dtype)
        target = flat.setdefault((piece.name, piece.part), empty)
        window = target[piece.start : piece.start + len(piece.values)]
        assert bool((window.isnan() | (window == piece.values)).all()), f"{piece.name} differs between ranks"
        window.copy_(piece.values)
        of_name[piece.name] = piece
    found = {}
    for name, piece in of_name.items():
        parts = [flat[name, part].view(piece.shape) for part in range(piece.parts)]
        assert not any(bool(part.isnan().any()) for part in parts), f"{name} is not whole"
        if piece.gated:
            halves = [part.chunk(2, piece.axis) for part in parts]
            parts = [half for side in zip(*halves, strict=True) for half in side]
        found[name] = torch.cat(parts, piece.axis)
    return found
