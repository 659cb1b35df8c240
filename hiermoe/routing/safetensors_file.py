"""Tensors of a safetensors file, mapped; its header is checked against the file before anything is read.

The form: eight bytes with the header's length, little-endian, the header in JSON (name: dtype, shape, data_offsets),
the bytes of all tensors.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

_HEADER_BYTES = 2**26
_DTYPES = {
    **{f"I{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": f"<u{size}" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": f"<f{size}" for size in (2, 4, 8)},
}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors by name, as read-only arrays that are not yet read.

    Raises:
        ValueError: no such file, truncated, or its header does not fit it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_HEADER_BYTES, size - 8):
            raise ValueError(f"{path}: it is truncated or no safetensors file: a header of {length} bytes in {size}")
        content = file.read(length)
    try:
        header = json.loads(content)
        items = [(str(name), dict(item)) for name, item in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path}: its header is no JSON of tensors") from None
    data = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.empty(0, np.uint8)
    taken = 0
    found = {}
    for name, item in items:
        array = _tensor(data, item)
        if array is None:
            raise ValueError(f"{path}: tensor {name[:60]!r} is {str(item)[:120]}, which does not fit {len(data)} bytes")
        taken += array.nbytes
        found[name] = array
    if taken > len(data):
        raise ValueError(f"{path}: its tensors overlap")
    return found


def _tensor(data: np.ndarray, item: dict[str, Any]) -> np.ndarray | None:
    """One tensor; None where its entry does not fit."""
    dtype, shape, offsets = item.get("dtype"), item.get("shape"), item.get("data_offsets")
    if dtype not in _DTYPES or not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return None
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
        return None
    begin, end = offsets
    if not begin <= end <= len(data) or end - begin != np.dtype(_DTYPES[dtype]).itemsize * math.prod(shape):
        return None
    return data[begin:end].view(_DTYPES[dtype]).reshape(shape)
