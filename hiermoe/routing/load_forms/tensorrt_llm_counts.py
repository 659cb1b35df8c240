"""TensorRT-LLM's counts: a folder of rank{r}.safetensors, a tensor [E] for ``"{iter}_{layer}"``.

Counts of all iterations and ranks are added. Layers are counted from 0 in the files, from 1 here.
"""

import re
from pathlib import Path

import numpy as np

from hiermoe.routing.importers.tensorrt_llm import by_iteration
from hiermoe.routing.load_forms.layer_loads import LayerLoads, checked_loads

_NAME = re.compile(r"rank(\d{1,6})\.safetensors")


def recognized(path: Path) -> str | None:
    """What the file or folder is, in words; None where it is of another form."""
    files = _files(path)
    return f"counts of TensorRT-LLM, {len(files)} ranks" if files else None


def read(path: Path) -> LayerLoads:
    """Add all counts.

    Raises:
        ValueError: damaged, or tensors that are no counts of as many experts.
    """
    total: dict[int, np.ndarray] = {}
    for file in _files(path):
        for (iteration, layer), array in by_iteration(file).items():
            first = next(iter(total.values()), array)
            if array.ndim != 1 or array.shape != first.shape or array.dtype.kind not in "iuf":
                raise ValueError(
                    f"{file}: {iteration}_{layer - 1} is {array.dtype} {list(array.shape)}; the rule is [E]"
                )
            total[layer] = total.get(layer, np.zeros(len(array))) + array
    if not total:
        raise ValueError(f"{path}: it has no counts")
    layers = sorted(total)
    notes = "Counts of all iterations and ranks were added. Layers are TensorRT-LLM's plus 1."
    return checked_loads(path, np.stack([total[layer] for layer in layers]), layers, notes)


def _files(path: Path) -> list[Path]:
    there = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in there if _NAME.fullmatch(file.name)]
