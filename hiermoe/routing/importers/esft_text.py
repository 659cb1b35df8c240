"""ESFT's expert_weights_<layer>.txt: a line a sequence, K ids a token by tabs, two tabs, as many weights.

That is what ESFT writes of DeepSeek-V2-Lite (``results/expert_scores/<task>/``). Give the folder of a task, whose files
are one trace, or one file. K is not in it: give it. Ids of a line are its tokens', one after another, K to each. Layers
are counted from 0 in the names, from 1 with the dense first layer in the trace: ``expert_weights_1.txt`` is layer 2.

Weights are as many as ids (that is checked), and are not taken.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hiermoe.routing.importers.recording import Recording, Source, narrowed
from hiermoe.routing.text_file import line_blocks

_PATTERN = "expert_weights_*.txt*"
_NAME = re.compile(r"expert_weights_(\d{1,4})\.txt(\.\w+)?")
_BLOCK_BYTES = 2**24


def recognized(path: Path) -> str | None:
    """What the file or folder is, in words; None where it is of another form."""
    files = sorted(path.glob(_PATTERN)) if path.is_dir() else [path]
    names = [_NAME.fullmatch(file.name) for file in files]
    if not names or not all(names):
        return None
    return f"ESFT's expert_weights_<layer>.txt, {len(files)} of them"


def read(source: Source) -> Recording:
    """Read a file a layer.

    Raises:
        ValueError: K was not given, a line is not of this form, or layers differ in sequences.
    """
    if source.topk is None:
        raise ValueError(f"{source.path}: the format does not say how many experts a token has; give --topk K")
    by_layer: dict[int, Path] = {}
    for file in source.files(_PATTERN):
        named = _NAME.fullmatch(file.name)
        if named is None:
            raise ValueError(f"{file}: the rule for its name is expert_weights_<layer>.txt")
        if (same := by_layer.setdefault(int(named[1]) + 1, file)) is not file:
            raise ValueError(f"{file.parent}: {same.name} and {file.name} are of one layer; leave one of them")
    kept, ids, ends = source.kept(by_layer), {}, {}
    for layer in kept:
        ids[layer], ends[layer] = _layer(source, by_layer[layer], source.topk)
        if ends[layer] != ends[kept[0]]:
            raise ValueError(
                f"{by_layer[layer]}: its sequences have not the {len(ends[kept[0]])} lengths of those in "
                f"{by_layer[kept[0]].name}"
            )

    def where(layer: int, row: int) -> str:
        line = int(np.searchsorted(ends[layer], row, side="right"))
        token = row - (ends[layer][line - 1] if line else 0)
        return f"{by_layer[layer]}: line {line + 1}, token {token} of layer {layer}"

    notes = f"Layers are ESFT's plus 1. K={source.topk} ids of a line are one token. Sequences: {len(ends[kept[0]])}."
    return Recording(ids, tuple(by_layer[layer] for layer in kept), where, notes)


def _layer(source: Source, path: Path, topk: int) -> tuple[np.ndarray, list[int]]:
    """Experts of a layer: uint16 [N, K], and the token after each sequence."""
    held, ends, count = [], [], 0
    for number, line in _lines(path):
        ids, tabs, weights = line.partition(b"\t\t")
        if not tabs or ids.translate(None, b"0123456789\t") or b"\t\t" in weights or not ids:
            raise ValueError(f"{path}: line {number} is truncated or no line of ids, two tabs and weights")
        choices, weighed = ids.count(b"\t") + 1, weights.count(b"\t") + 1
        if choices != weighed:
            raise ValueError(f"{path}: line {number} has {choices} ids and {weighed} weights")
        if choices % topk:
            raise ValueError(f"{path}: line {number} has {choices} ids, no multiple of topk={topk}")
        ids_TK = np.fromstring(ids, np.int64, sep="\t").reshape(-1, topk)
        held.append(narrowed(ids_TK, lambda row, line=number: f"{path}: line {line}, token {row}"))
        count += len(ids_TK)
        ends.append(count)
        if source.max_tokens is not None and count >= source.max_tokens:
            break
    if not held:
        raise ValueError(f"{path}: it is empty")
    return np.concatenate(held)[: source.max_tokens], ends


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers."""
    for first, block in line_blocks(path, _BLOCK_BYTES):
        for number, line in enumerate(block.splitlines(), first):
            if line.strip():
                yield number, line.rstrip(b"\r\n\t ")
