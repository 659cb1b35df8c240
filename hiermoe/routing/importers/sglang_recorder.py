"""SGLang's expert distribution recorder, mode per_token: a file of torch.save a rank, physical ids and their map.

``expert_distribution_recorder_{time}_{rank}.pt`` holds records, one a forward pass, with ``topk_ids_of_layer`` int32
[layers, T, 8], padded with -1 whatever K is, and ``last_physical_to_logical_map`` [layers, P], through which ids go.
Give one file, or the folder of all ranks' files. Where several ranks hold the same tokens (tensor parallelism without
attention data parallelism), give the file of one of them: the import refuses the others.

The recorder counts all layers of the model from 0, the trace from 1; dense ones are -1 and left out. Tokens follow each
other pass after pass, rank after rank. The map is the last one: where experts moved while it recorded, ids of earlier
passes were physical places of an earlier map, which the file does not have.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hiermoe.routing.importers.recording import NO_EXPERT, Recording, Source, narrowed
from hiermoe.routing.importers.torch_file import content_of, opened

MAP = "last_physical_to_logical_map"
_IDS = "topk_ids_of_layer"
_Pass = tuple[tuple[int, int, int], str, np.ndarray]  # place in the order, name, logical ids uint16 [layers, T, 8]
_PATTERN = "expert_distribution_recorder_*.pt"


def recognized(path: Path) -> str | None:
    """What the file or folder is, in words; None where it is of another form."""
    files = sorted(path.glob(_PATTERN)) if path.is_dir() else [path]
    content = content_of(files[0]) if files else None
    if not isinstance(content, dict) or MAP not in content or not isinstance(content.get("records"), list):
        return None
    if not content["records"] or _IDS not in _keys(content["records"][0]):
        return None
    return (
        f"SGLang's recorder, mode per_token, {len(files)} of its files, {len(content['records'])} passes in the first"
    )


def read(source: Source) -> Recording:
    """Read all passes of all ranks.

    Raises:
        ValueError: not such a file, ids outside the map, ranks with the same tokens, or passes of other layers.
    """
    files = source.files(_PATTERN)
    parts: list[_Pass] = []
    num_experts = 0
    for number, path in enumerate(files):
        mine, experts = _passes(path, number)
        num_experts = max(num_experts, experts)
        if any(_same(mine, other) for other in (parts[start:end] for start, end in _runs(parts))):
            raise ValueError(f"{path}: it has the tokens of another rank (tensor parallelism); give one rank's file")
        parts += mine
    if not parts:
        raise ValueError(f"{source.path}: it has no tokens")
    parts.sort(key=lambda part: part[0])
    layers = parts[0][2].shape[0]
    if (other := next((part for part in parts if part[2].shape[0] != layers), None)) is not None:
        raise ValueError(f"{other[1]}: {other[2].shape[0]} layers, {layers} in {parts[0][1]}")
    ends = np.cumsum([part[2].shape[1] for part in parts])
    wanted = source.kept(range(1, layers + 1))
    ids = {layer: np.concatenate([part[2][layer - 1] for part in parts])[: source.max_tokens] for layer in wanted}

    def where(layer: int, row: int) -> str:
        at = int(np.searchsorted(ends, row, side="right"))
        return f"{parts[at][1]}: token {row - (int(ends[at - 1]) if at else 0)}, layer {layer}"

    notes = (
        "Layers are SGLang's plus 1. Physical ids went through the file's last map. Tokens follow each other pass "
        "after pass, rank after rank."
    )
    return Recording(ids, tuple(files), where, notes, num_experts=num_experts)


def map_of(content: dict[str, Any], file: Any, path: Path) -> np.ndarray:
    """The map from physical to logical experts: int64 [layers, P].

    Raises:
        ValueError: it is missing, or names no experts.
    """
    if content.get(MAP) is None:
        raise ValueError(f"{path}: it has no {MAP}: its physical ids stand for no experts")
    map_LP = file.array(content[MAP], f"{path}: {MAP}", "integer", 2).astype(np.int64)
    if map_LP.size == 0 or map_LP.min() < 0 or map_LP.max() >= NO_EXPERT:
        raise ValueError(f"{path}: {MAP} is empty or names experts outside 0..{NO_EXPERT - 1}")
    return map_LP


def _passes(path: Path, number: int) -> tuple[list[_Pass], int]:
    """All passes of a file, and E: its map has every logical expert."""
    file, passes = opened(path), []
    content = file.content
    if not isinstance(content, dict) or not isinstance(content.get("records"), list):
        raise ValueError(f"{path}: it has no records of SGLang's recorder")
    map_LP = map_of(content, file, path)
    for at, record in enumerate(content["records"]):
        place = f"{path}: record {at}"
        if _IDS not in _keys(record):
            raise ValueError(f"{place} has no {_IDS}: record in mode per_token")
        physical = file.array(record[_IDS], place, "integer", 3)
        if len(physical) != len(map_LP):
            raise ValueError(f"{place} has {len(physical)} layers, {MAP} has {len(map_LP)}")
        if physical.size and (physical.min() < -1 or physical.max() >= map_LP.shape[1]):
            raise ValueError(f"{place}: physical ids outside -1..{map_LP.shape[1] - 1}")
        logical = np.empty(physical.shape, np.uint16)
        for layer, (out, ids_TK) in enumerate(zip(logical, physical, strict=True)):
            found = narrowed(map_LP[layer][ids_TK], lambda row, of=f"{place}: layer {layer + 1}": f"{of}, token {row}")
            out[:] = np.where(ids_TK < 0, NO_EXPERT, found)
        order = record.get("forward_pass_id", at)
        passes.append(((order if type(order) is int else at, number, at), place, logical))
    return passes, int(map_LP.max()) + 1


def _keys(record: object) -> dict[str, Any]:
    return record if isinstance(record, dict) else {}


def _runs(parts: list[_Pass]) -> list[tuple[int, int]]:
    """Where the passes of each file read so far begin and end."""
    starts = [at for at, part in enumerate(parts) if at == 0 or part[0][1] != parts[at - 1][0][1]]
    return list(zip(starts, [*starts[1:], len(parts)], strict=True)) if parts else []


def _same(one: list[_Pass], other: list[_Pass]) -> bool:
    """Whether two ranks hold the same tokens throughout, which no two have by chance."""
    return len(one) == len(other) > 0 and all(np.array_equal(a[2], b[2]) for a, b in zip(one, other, strict=True))
