"""llama.cpp's imatrix, GGUF: ``blk.<layer>.ffn_*_exps.weight.counts``, f32 of E counts. Layers are counted from 1 here.

Of a layer's up, gate and down matrices, which count the same tokens, the first is taken.
"""

import math
import re
import struct
from pathlib import Path
from typing import IO

import numpy as np

from hiermoe.routing.load_forms.layer_loads import LayerLoads, checked_loads

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_NAME = re.compile(r"blk\.(\d{1,4})\.ffn_\w+_exps\.weight\.counts")
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value by its type
_TEXT, _ARRAY, _F32 = 8, 9, 0
_MOST_ITEMS, _MOST_TEXT = 2**20, 2**20


def recognized(path: Path) -> str | None:
    """What the file is, in words; None where it is of another form."""
    if path.is_dir():
        return None
    with path.open("rb") as file:
        return "an imatrix of llama.cpp (GGUF)" if file.read(4) == _MAGIC else None


def read(path: Path) -> LayerLoads:
    """Read the counts of all layers.

    Raises:
        ValueError: no GGUF, truncated, or it has no counts of experts.
    """
    try:
        found = _counts(path)
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: it is truncated or no GGUF: {error}") from None
    if not found:
        raise ValueError(f"{path}: it has no tensor blk.<layer>.ffn_*_exps.weight.counts: no imatrix of experts")
    if len({len(each) for each in found.values()}) > 1:
        raise ValueError(f"{path}: its layers differ in experts")
    layers = sorted(found)
    notes = "Layers are llama.cpp's plus 1."
    return checked_loads(path, np.stack([found[layer] for layer in layers]), layers, notes)


def _counts(path: Path) -> dict[int, np.ndarray]:
    size, found = path.stat().st_size, {}
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise ValueError(f"{path}: it is no GGUF")
        version, tensors, pairs = _unpacked(file, "<IQQ")
        if version not in _VERSIONS or max(tensors, pairs) > _MOST_ITEMS:
            raise ValueError(f"{path}: GGUF version {version} of {tensors} tensors and {pairs} values")
        alignment = 32
        for _ in range(pairs):
            key, value = _text(path, file), _value(path, file, _unpacked(file, "<I")[0])
            alignment = value if key == "general.alignment" and value else alignment
        wanted: list[tuple[int, int, int]] = []
        for _ in range(tensors):
            name = _text(path, file)
            (axes,) = _unpacked(file, "<I")
            if axes > 8:
                raise ValueError(f"{path}: tensor {name[:60]!r} has {axes} axes")
            shape = _unpacked(file, f"<{axes}Q")
            kind, offset = _unpacked(file, "<IQ")
            if (match := _NAME.fullmatch(name)) is not None:
                if kind != _F32:
                    raise ValueError(f"{path}: tensor {name} is of type {kind}; the rule is f32")
                wanted.append((int(match[1]) + 1, offset, math.prod(shape)))
        start = -(-file.tell() // alignment) * alignment
        for layer, offset, count in wanted:
            if start + offset + 4 * count > size:
                raise ValueError(f"{path}: {count} counts of layer {layer} lie behind its end: it is truncated")
            file.seek(start + offset)
            found.setdefault(layer, np.frombuffer(file.read(4 * count), "<f4"))
    return found


def _unpacked(file: IO[bytes], form: str) -> tuple[int, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _text(path: Path, file: IO[bytes]) -> str:
    (length,) = _unpacked(file, "<Q")
    if length > _MOST_TEXT:
        raise ValueError(f"{path}: a name of {length} bytes")
    content = file.read(length)
    if len(content) < length:
        raise ValueError(f"{path}: it is truncated")
    return content.decode()


def _value(path: Path, file: IO[bytes], kind: int) -> int:
    """Skip a value; what it is where it is an unsigned integer of four bytes."""
    if kind == 4:
        return _unpacked(file, "<I")[0]
    if kind == _TEXT:
        _text(path, file)
    elif kind == _ARRAY:
        of, length = _unpacked(file, "<IQ")
        if length > _MOST_ITEMS or (of != _TEXT and of not in _SCALARS):
            raise ValueError(f"{path}: an array of {length} values of type {of}")
        if of == _TEXT:
            for _ in range(length):
                _text(path, file)
        else:
            file.seek(length * _SCALARS[of], 1)
    elif kind in _SCALARS:
        file.seek(_SCALARS[kind], 1)
    else:
        raise ValueError(f"{path}: a value of type {kind}")
    return 0
