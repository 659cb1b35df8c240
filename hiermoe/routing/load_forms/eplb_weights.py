"""EPLB's weights: an array [layers, E], by ``numpy.save`` or ``torch.save``. Layers are numbered by place, from 0."""

from pathlib import Path

import numpy as np

from hiermoe.routing.importers.torch_file import content_of, looks_saved, opened
from hiermoe.routing.load_forms.layer_loads import LayerLoads, checked_loads

_NOTES = "Layers are numbered by their place, from 0."


def recognized(path: Path) -> str | None:
    """What the file is, in words; None where it is of another form."""
    if path.is_dir():
        return None
    if looks_saved(path):
        shape = getattr(content_of(path), "shape", ())
    else:
        with path.open("rb") as file:
            if file.read(6) != b"\x93NUMPY":
                return None
        shape = _numpy(path).shape
    return f"weights [layers, E] = {list(shape)}, as EPLB takes them" if len(shape) == 2 else None


def read(path: Path) -> LayerLoads:
    """Read the array.

    Raises:
        ValueError: damaged, or no two axes of numbers >= 0.
    """
    if looks_saved(path):
        file = opened(path)
        kind = "float" if "float" in str(getattr(file.content, "dtype", "")) else "integer"
        weights = file.array(file.content, str(path), kind, 2)
    else:
        weights = _numpy(path)
    if weights.dtype.kind not in "iuf":
        raise ValueError(f"{path}: dtype {weights.dtype}; the rule is numbers")
    return checked_loads(path, weights, list(range(len(weights))), _NOTES)


def _numpy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: it is truncated or no .npy file: {str(error).splitlines()[0]}") from error
    return array
