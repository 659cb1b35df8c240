"""What every form of loads hands over."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hiermoe.routing.trace import MOST_EXPERTS


@dataclass(frozen=True)
class LayerLoads:
    """Loads of all layers of a file.

    Attributes:
        loads: for each layer float64 [E], at least 0, in the file's unit.
        notes: what the form does not say, in sentences.
    """

    loads: dict[int, np.ndarray]
    notes: str


def checked_loads(path: Path, load_LE: np.ndarray, layers: list[int], notes: str) -> LayerLoads:
    """Layers with their loads; those without any are left out and said.

    Args:
        path: for messages.
        load_LE: numbers [layers, E].
        layers: their numbers.
        notes: see `LayerLoads`.

    Raises:
        ValueError: no layers or experts, too many of them, or a load that is negative or no number.
    """
    if load_LE.ndim != 2 or 0 in load_LE.shape or load_LE.shape[1] > MOST_EXPERTS:
        raise ValueError(
            f"{path}: loads of shape {list(load_LE.shape)}; the rule is [layers, 1 to {MOST_EXPERTS} experts]"
        )
    load_LE = load_LE.astype(np.float64)
    bad = ~(np.isfinite(load_LE) & (load_LE >= 0))
    if bad.any():
        layer, expert = (int(each) for each in np.argwhere(bad)[0])
        raise ValueError(
            f"{path}: layer {layers[layer]}: load of expert {expert} is {load_LE[layer, expert]}; the rule is >= 0"
        )
    empty = [layer for layer, load_E in zip(layers, load_LE, strict=True) if not load_E.any()]
    if len(empty) == len(layers):
        raise ValueError(f"{path}: all loads are 0")
    if empty:
        notes += f" Layers {', '.join(map(str, empty))} have no load (dense) and were left out."
    return LayerLoads({layer: row for layer, row in zip(layers, load_LE, strict=True) if layer not in empty}, notes)
