"""MoE_expert_selection_trace (core12345, Hugging Face): a JSON a request, its prefill, then an entry a decoded token.

An entry is ``{"layer": [[ids], ...] or null}``: for each layer a list of K experts a token, many tokens in the first
entry, one in the others. Give one file, or a folder of requests, which then follow each other. Layers are counted from
0 in the files, from 1 in the trace. A layer that is null in all entries has no routing (dense) and is left out; where
it is null in some, their tokens are.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from hiermoe.routing.importers.json_records import objects
from hiermoe.routing.importers.recording import NO_EXPERT, Recording, Source, narrowed
from hiermoe.routing.text_file import beginning

_PATTERNS = ("*.json", "*.json.*")
_BEGINS = re.compile(rb"\s*\[\s*\{\s*\"\d{1,4}\"\s*:\s*(null|\[\s*\[)")


def recognized(path: Path) -> str | None:
    """What the file or folder is, in words; None where it is of another form."""
    files = sorted({file for pattern in _PATTERNS for file in path.glob(pattern)}) if path.is_dir() else [path]
    if not files or not _BEGINS.match(beginning(files[0])):
        return None
    return f"entries of layers and their ids, a JSON a request, {len(files)} requests"


def read(source: Source) -> Recording:
    """Read all requests.

    Raises:
        ValueError: an entry is not of this form, or layers differ in tokens or K.
    """
    files = source.files(*_PATTERNS)
    pieces: dict[int, list[np.ndarray | None]] = {}
    lengths: list[int] = []
    places: list[str] = []
    topk = source.topk
    for path in files:
        for line, text in objects(path):
            place = f"{path}: line {line}"
            entry = _entry(place, text)
            found = {layer: _ids(place, layer, value) for layer, value in entry.items() if value is not None}
            for layer, ids_TK in found.items():
                topk = topk or ids_TK.shape[1]
                if ids_TK.shape[1] != topk or len(ids_TK) != len(next(iter(found.values()))):
                    raise ValueError(
                        f"{place}: layer {layer} has {len(ids_TK)} tokens of {ids_TK.shape[1]} experts; the rule is as "
                        f"many tokens in all layers, K={topk}"
                    )
            if not found:
                continue
            for layer in {*pieces, *entry}:
                pieces.setdefault(layer, [None] * len(lengths)).append(found.get(layer))
            lengths.append(len(next(iter(found.values()))))
            places.append(place)
        if source.max_tokens is not None and sum(lengths) >= source.max_tokens:
            break
    if not lengths or topk is None:
        raise ValueError(f"{source.path}: it has no tokens")
    dense = sorted(layer for layer, parts in pieces.items() if all(part is None for part in parts))
    kept = source.kept(set(pieces) - set(dense))
    ids: dict[int, np.ndarray] = {}
    for layer in kept:
        none = (np.full((length, topk), NO_EXPERT, np.uint16) for length in lengths)
        parts = [empty if part is None else part for part, empty in zip(pieces.pop(layer), none, strict=True)]
        ids[layer] = np.concatenate(parts)[: source.max_tokens]
    ends = np.cumsum(lengths)

    def where(layer: int, row: int) -> str:
        at = int(np.searchsorted(ends, row, side="right"))
        return f"{places[at]}: token {row - (int(ends[at - 1]) if at else 0)}, layer {layer}"

    left_out = (f"layers {', '.join(map(str, dense))}, which are null throughout",) if dense else ()
    notes = f"Layers are the file's plus 1. {len(files)} requests follow each other, each prefill first."
    return Recording(ids, tuple(files), where, notes, left_out=left_out)


def _entry(place: str, text: bytes) -> dict[int, Any]:
    """Layers, counted from 1, with what the entry has for each."""
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is truncated or malformed: {str(error).splitlines()[0]}") from None
    if odd := next((key for key in entry if not re.fullmatch(r"\d{1,4}", key)), None):
        raise ValueError(f"{place}: {odd[:40]!r} is no number of a layer")
    return {int(key) + 1: value for key, value in entry.items()}


def _ids(place: str, layer: int, value: Any) -> np.ndarray:
    """A layer's experts: uint16 [T, K]."""
    try:
        array = np.array(value)
    except ValueError:  # of unequal lengths
        array = np.empty(0)
    if array.ndim != 2 or array.dtype.kind != "i" or array.size == 0:
        raise ValueError(f"{place}: layer {layer} is no list of lists of K integers each")
    return narrowed(array, lambda row: f"{place}: token {row}, layer {layer}")
