"""Arrays [tokens, layers, K], one or one a request, as a recording: checked a part at a time, put one after another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hiermoe.routing.importers.recording import CHUNK_TOKENS, Recording, Source, narrowed


@dataclass(frozen=True)
class Part:
    """Tokens that follow each other in a file.

    Attributes:
        where: they stand, for messages.
        ids: integer [tokens, layers, K], an array or a file of one.
    """

    where: str
    ids: "np.ndarray | ArrayFile"


class ArrayFile:
    """An array that ``numpy.save`` wrote, of which slices along the first axis are read and no more.

    A mapped file would do the same, but its pages count as memory of the process while they are not needed elsewhere.

    Attributes:
        shape: of the array.
        dtype: of the array.
        ndim: number of axes.
    """

    def __init__(self, path: Path, array: np.memmap) -> None:
        """Take where the array is, not what is in it.

        Args:
            path: of the file.
            array: as ``numpy.load`` maps it, in C's order.
        """
        self._path, self._start = path, int(array.offset)
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __len__(self) -> int:
        """Of the first axis."""
        return self.shape[0]

    def __getitem__(self, some: slice) -> np.ndarray:
        """A slice along the first axis."""
        start, stop, _ = some.indices(len(self))
        row = math.prod(self.shape[1:])
        offset = self._start + start * row * self.dtype.itemsize
        return np.fromfile(self._path, self.dtype, (stop - start) * row, offset=offset).reshape(-1, *self.shape[1:])


def from_parts(source: Source, files: tuple[Path, ...], parts: Sequence[Part], first: int, notes: str) -> Recording:
    """Parts one after another, as many tokens of them as are asked for.

    Args:
        source: what was asked for.
        files: that were read.
        parts: in the order of their tokens.
        first: number of the first layer, unless the source says another.
        notes: what the form does not say, in sentences.

    Raises:
        ValueError: no three axes of integers, parts that differ in layers or K, or K is another one than asked for.
    """
    for part in parts:
        _check(source, part, parts[0])
    ends = np.cumsum([len(part.ids) for part in parts], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        raise ValueError(f"{source.path}: it has no tokens")
    count = min(total, source.max_tokens or total)
    _, layers, topk = parts[0].ids.shape
    first = first if source.first_layer is None else source.first_layer

    def where(layer: int, row: int) -> str:
        part = int(np.searchsorted(ends, row, side="right"))
        return f"{parts[part].where}: token {row - (int(ends[part - 1]) if part else 0)}, layer {layer}"

    ids = {layer: np.empty((count, topk), np.uint16) for layer in source.kept(range(first, first + layers))}
    at, at_once = 0, max(1, CHUNK_TOKENS // layers)
    for part in parts:
        for start in range(0, min(len(part.ids), count - at), at_once):
            chunk = np.asarray(part.ids[start : min(start + at_once, count - at)])
            for layer, out in ids.items():
                narrow = narrowed(chunk[:, layer - first], lambda row, of=layer, to=at + start: where(of, to + row))
                out[at + start : at + start + len(chunk)] = narrow
        at = min(at + len(part.ids), count)
    return Recording(ids, files, where, notes, filled_with_zeros=True)


def _check(source: Source, part: Part, first: Part) -> None:
    ids = part.ids
    if ids.ndim != 3:
        raise ValueError(f"{part.where}: shape {ids.shape}; the rule is one array [tokens, layers, K]")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{part.where}: dtype {ids.dtype}; the rule is an integer")
    if source.topk not in (None, ids.shape[2]):
        raise ValueError(f"{part.where}: K={ids.shape[2]} experts a token, topk={source.topk} was asked for")
    if 0 in ids.shape[1:]:
        raise ValueError(f"{part.where}: shape {ids.shape}: no layers, or K=0 experts a token")
    if ids.shape[1:] != first.ids.shape[1:]:
        raise ValueError(
            f"{part.where}: {ids.shape[1]} layers and K={ids.shape[2]}, in {first.where} {first.ids.shape[1]} and "
            f"{first.ids.shape[2]}"
        )
