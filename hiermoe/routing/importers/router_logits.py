"""transformers' router logits, saved by torch.save: a tuple with [batch x sequence, E] a layer. Needs --topk.

``output_router_logits=True`` gives them; the K experts of a token are taken here, the K largest. What a router does
beside that is not in the logits: a limit to groups and an expert bias (DeepSeek-V3) are missing, and the trace's notes
say so. Padding tokens have logits like others. Layers are numbered by place, from 0 or ``--first-layer``.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from hiermoe.routing.importers.recording import Recording, Source
from hiermoe.routing.importers.torch_file import content_of, opened
from hiermoe.routing.trace import MOST_EXPERTS

_CHUNK_LOGITS = 2**24  # looked at at once


def recognized(path: Path) -> str | None:
    """What the file is, in words; None where it is of another form."""
    content = _layers(content_of(path))
    if not content or not all(len(getattr(each, "shape", ())) == 2 for each in content.values()):
        return None
    if not all("float" in str(each.dtype) for each in content.values()):
        return None
    return f"router logits [tokens, E] of {len(content)} layers, as transformers gives them"


def read(source: Source) -> Recording:
    """Take the K largest of every token.

    Raises:
        ValueError: K was not given, not such a tuple, layers that differ, or a logit that is no number.
    """
    path, topk = source.path, source.topk
    if topk is None:
        raise ValueError(f"{path}: logits do not say how many experts a token goes to; give --topk K")
    file = opened(path)
    there = {number + (source.first_layer or 0): value for number, value in _layers(file.content).items()}
    if not there:
        raise ValueError(f"{path}: the rule is a tuple of logits [tokens, E], one a layer")
    kept, ids, shape = source.kept(there), {}, None

    def where(layer: int, row: int) -> str:
        return f"{path}: token {row}, layer {layer}"

    for layer in kept:
        logits_NE = file.array(there[layer], f"{path}: layer {layer}", "float", 2)
        shape = shape or logits_NE.shape
        if logits_NE.shape != shape:
            raise ValueError(f"{path}: layer {layer} has shape {list(logits_NE.shape)}, another {list(shape)}")
        if not topk <= shape[1] <= MOST_EXPERTS:
            raise ValueError(f"{path}: {shape[1]} logits a token; the rule is topk={topk} to {MOST_EXPERTS}")
        ids[layer] = _largest(logits_NE[: source.max_tokens], topk, lambda row, of=layer: where(of, row))
    notes = (
        f"Each token's experts are its {topk} largest logits: a limit to groups and an expert bias, where the router "
        "has them, are not in logits, so its own choice may differ. Layers are numbered by their place in the tuple."
    )
    return Recording(ids, (path,), where, notes, num_experts=None if shape is None else shape[1])


def _largest(logits_NE: np.ndarray, topk: int, where: Any) -> np.ndarray:
    """Experts of the K largest logits, largest first: uint16 [N, K]."""
    out = np.empty((len(logits_NE), topk), np.uint16)
    rows = max(1, _CHUNK_LOGITS // logits_NE.shape[1])
    for start in range(0, len(logits_NE), rows):
        part = torch.from_numpy(np.asarray(logits_NE[start : start + rows], np.float32))
        if (bad := torch.isnan(part).any(dim=1)).any():
            raise ValueError(f"{where(start + int(bad.int().argmax()))}: a logit is no number (NaN)")
        out[start : start + len(part)] = part.topk(topk, dim=1).indices.numpy()
    return out


def _layers(content: Any) -> dict[int, Any]:
    """Logits by place; layers without are left out."""
    if isinstance(content, dict):
        content = content.get("router_logits")
    if not isinstance(content, list | tuple):
        return {}
    return {number: each for number, each in enumerate(content) if each is not None}
