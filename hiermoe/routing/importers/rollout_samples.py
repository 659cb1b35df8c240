"""slime's and Miles's rollouts, saved by torch.save: ``rollout_routed_experts`` [len - 1, all layers, K] a sample.

slime writes them with ``--save-debug-rollout-data``: a dict with ``samples``, one dict each. Miles's replay files are
read where they have the same keys, or are one array [tokens, layers, K] or a list of them. Layers of the model are
counted from 0 there, from 1 in the trace, where no ``--first-layer`` says otherwise; holes are zeros (slime) or -1
(Miles), and dense layers either: they are left out. Samples follow each other.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from hiermoe.routing.importers.recording import Recording, Source
from hiermoe.routing.importers.stacked import Part, from_parts
from hiermoe.routing.importers.torch_file import content_of, opened

_KEYS = ("rollout_routed_experts", "routed_experts")


def recognized(path: Path) -> str | None:
    """What the file is, in words; None where it is of another form."""
    found = _arrays(content_of(path))
    if not found or not all(len(getattr(value, "shape", ())) == 3 for _, value in found):
        return None
    return f"routed experts of {len(found)} samples, as slime and Miles save them"


def read(source: Source) -> Recording:
    """Read all samples.

    Raises:
        ValueError: not such a file, or samples that differ in layers or K.
    """
    path = source.path
    file = opened(path)
    found = _arrays(file.content)
    if not found:
        raise ValueError(f"{path}: no sample of it has {' or '.join(_KEYS)}")
    named = [(f"{path}: {where}" if where else str(path), value) for where, value in found]
    parts = [Part(where, file.array(value, where, "integer", 3)) for where, value in named]
    notes = "Layers are numbered by place. Samples follow each other; a sample's last token has no routing."
    return from_parts(source, (path,), parts, 1, notes)


def _arrays(content: Any) -> list[tuple[str, Any]]:
    """Arrays of the samples, and what they are called."""
    if isinstance(content, torch.Tensor | np.ndarray):
        return [("", content)]
    if isinstance(content, dict):
        content = content.get("samples", [content])
    if not isinstance(content, list):
        return []
    found = []
    for at, sample in enumerate(content):
        if isinstance(sample, dict):
            found += [(f"sample {at}", sample[key]) for key in _KEYS if sample.get(key) is not None]
        elif isinstance(sample, torch.Tensor | np.ndarray) and sample.ndim == 3:
            found.append((f"sample {at}", sample))
    return found
