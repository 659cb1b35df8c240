"""Megatron's tokens_per_expert, JSON lines: {"iter", "block", "layer", "tpe": [[local experts] a micro-batch]}.

``--save-tokens-per-expert-interval`` writes ``<save>/tokens_per_expert/rank{r}.jsonl``. Experts are a rank's own: those
of rank 1 follow those of rank 0. Give the folder, whose ranks must be one expert-parallel group; lines of all
iterations and micro-batches are added. Layers are as in the file; lines of other blocks than the decoder are left out.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from hiermoe.routing.importers.json_records import objects
from hiermoe.routing.load_forms.layer_loads import LayerLoads, checked_loads
from hiermoe.routing.text_file import beginning

_NAME = re.compile(r"rank_?(\d{1,6})\.jsonl(\.\w+)?")


def recognized(path: Path) -> str | None:
    """What the file or folder is, in words; None where it is of another form."""
    files = _files(path)
    if not files or b'"tpe"' not in beginning(files[0]):
        return None
    return f"Megatron's tokens per expert, {len(files)} ranks"


def read(path: Path) -> LayerLoads:
    """Add all lines.

    Raises:
        ValueError: a line is not of this form, or ranks differ in layers or experts.
    """
    ranks = [_rank(file) for file in _files(path)]
    if not ranks or not ranks[0]:
        raise ValueError(f"{path}: it has no lines of the decoder's layers")
    layers = sorted(ranks[0])
    for file, rank in zip(_files(path), ranks, strict=True):
        if sorted(rank) != layers:
            raise ValueError(f"{file}: layers {sorted(rank)}, {layers} in the first: give one expert-parallel group")
    experts = {layer: np.concatenate([rank[layer] for rank in ranks]) for layer in layers}
    if len({len(each) for each in experts.values()}) > 1:
        raise ValueError(f"{path}: its layers differ in experts")
    notes = f"Experts of {len(ranks)} ranks were put one after another. Counts of all lines were added."
    return checked_loads(path, np.stack([experts[layer] for layer in layers]), layers, notes)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    named = ((_NAME.fullmatch(file.name), file) for file in path.iterdir())
    return [file for _, file in sorted((int(match[1]), file) for match, file in named if match)]


def _rank(path: Path) -> dict[int, np.ndarray]:
    """Counts of a rank's own experts by layer."""
    found: dict[int, np.ndarray] = {}
    for line, text in objects(path):
        place = f"{path}: line {line}"
        try:
            record: dict[str, Any] = json.loads(text)
            layer, block = record["layer"], record.get("block")
            counts = np.array(record["tpe"])
        except (ValueError, KeyError, RecursionError) as error:
            raise ValueError(f"{place} is truncated or has no layer or tpe: {str(error).splitlines()[0]}") from None
        if block not in (None, "decoder"):
            continue
        if type(layer) is not int or counts.ndim != 2 or counts.dtype.kind not in "if" or (counts < 0).any():
            raise ValueError(f"{place}: the rule is a layer, and tpe of lists of numbers >= 0")
        added = counts.sum(axis=0, dtype=np.float64)
        if len(found.setdefault(layer, np.zeros(len(added)))) != len(added):
            raise ValueError(f"{place}: layer {layer} has {len(added)} experts here, {len(found[layer])} before")
        found[layer] = found[layer] + added
    return found
