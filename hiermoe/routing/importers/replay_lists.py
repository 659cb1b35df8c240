"""Megatron-Core's RouterReplay, saved by torch.save: a list of expert ids [T, K], one a layer.

That is what ``RouterReplay`` records (``get_recorded_data``) and its user saves. Layers are numbered by their place,
from 0 or ``--first-layer``. A layer without recording is None, and left out.
"""

from pathlib import Path

import numpy as np

from hiermoe.routing.importers.recording import Recording, Source, narrowed
from hiermoe.routing.importers.torch_file import content_of, opened


def recognized(path: Path) -> str | None:
    """What the file is, in words; None where it is of another form."""
    content = content_of(path)
    there = [each for each in content if each is not None] if isinstance(content, list | tuple) else []
    if not there or not all(hasattr(each, "shape") and len(each.shape) == 2 for each in there):
        return None
    if "float" in str(there[0].dtype):
        return None
    return f"a list of expert ids [T, K] of {len(there)} layers, as Megatron-Core's RouterReplay has them"


def read(source: Source) -> Recording:
    """Read all layers.

    Raises:
        ValueError: not such a list, or layers that differ in tokens or K.
    """
    path, first = source.path, source.first_layer or 0
    file = opened(path)
    if not isinstance(file.content, list | tuple):
        raise ValueError(f"{path}: {type(file.content).__name__}; the rule is a list of expert ids [T, K], one a layer")
    there = {layer: value for layer, value in enumerate(file.content, first) if value is not None}
    arrays = {layer: file.array(value, f"{path}: layer {layer}", "integer", 2) for layer, value in there.items()}
    kept = source.kept(arrays)
    if not kept:
        raise ValueError(f"{path}: it has no tokens")
    for layer in kept:
        if arrays[layer].shape != arrays[kept[0]].shape:
            shapes = f"{list(arrays[layer].shape)}, layer {kept[0]} is {list(arrays[kept[0]].shape)}"
            raise ValueError(f"{path}: layer {layer} is {shapes}; the rule is one [T, K] for all")
    if source.topk not in (None, arrays[kept[0]].shape[1]):
        raise ValueError(f"{path}: K={arrays[kept[0]].shape[1]} experts a token, topk={source.topk} was asked for")

    def where(layer: int, row: int) -> str:
        return f"{path}: token {row}, layer {layer}"

    ids: dict[int, np.ndarray] = {}
    for layer in kept:
        part = arrays[layer][: source.max_tokens]
        ids[layer] = narrowed(part, lambda row, of=layer: where(of, row))
    missing = len(file.content) - len(there)
    left_out = (f"{missing} layers that are None",) if missing else ()
    return Recording(ids, (path,), where, "Layers are numbered by their place in the list.", left_out=left_out)
