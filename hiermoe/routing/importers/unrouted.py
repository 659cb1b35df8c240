"""Tokens and layers without routing: what several systems write where they know nothing, and what is no expert 0.

Recorders fill what they have no routing of with -1 or with zeros: prefixes that came from a cache, padding, layers that
have no experts. No token has an expert twice, so a row of zeros is none from K = 2 on. At K = 1 a zero may be expert 0.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from hiermoe.routing.importers.recording import NO_EXPERT, Recording, Source

MOST_BY_CHANCE = 0.01  # tokens whose zeros in all layers may each be a choice


def without_unrouted(recording: Recording, source: Source) -> Recording:
    """The recording without layers that have no routing, and without tokens that have none in some other layer.

    Takes the layers of the given one, and writes into them, so that no two copies of all of them are held.

    Raises:
        ValueError: a token has some of its experts only, nothing is left, or nothing tells whether zeros are expert 0.
    """
    ids = _without_empty_columns(recording.ids)
    none: dict[int, np.ndarray] = {}
    for layer, ids_NK in ids.items():
        missing_NK = ids_NK == NO_EXPERT
        none[layer] = missing_NK.all(axis=1)
        if (some := missing_NK.any(axis=1) & ~none[layer]).any():
            row = int(some.argmax())
            shown = [-1 if x == NO_EXPERT else int(x) for x in ids_NK[row]]
            raise ValueError(
                f"{recording.where(layer, row)}: expert ids {shown}: a token has all of its experts or none (all -1)"
            )
        if ids_NK.shape[1] > 1:
            none[layer] |= (ids_NK == 0).all(axis=1)
    if recording.filled_with_zeros and all(ids_NK.shape[1] == 1 for ids_NK in ids.values()):
        zeros = {layer: ids_NK[:, 0] == 0 for layer, ids_NK in ids.items()}
        none = {layer: none[layer] | each for layer, each in _zeros_of_nobody(zeros, source).items()}
    empty = [layer for layer in ids if none[layer].all()]
    if len(empty) == len(ids) or (source.layers and empty):
        raise ValueError(f"{source.path}: layer {empty[0]} has no routing: all of its rows are -1 or 0")
    kept = {layer: ids_NK for layer, ids_NK in ids.items() if layer not in empty}
    recording.ids.clear()
    routed_N = ~np.any([none[layer] for layer in kept], axis=0)
    left_out = list(recording.left_out)
    if empty:
        left_out.append(f"layers {', '.join(map(str, empty))}, which have no routing (all -1 or 0)")
    if routed_N.all():
        return replace(recording, ids=kept, left_out=tuple(left_out))
    if not routed_N.any():
        raise ValueError(f"{source.path}: every token is without routing (-1 or 0) in some layer")
    count = len(routed_N)
    left_out.append(f"{count - int(routed_N.sum())} of {count} tokens, which have no routing (all -1 or 0)")
    num_tokens, rows, where = recording.num_tokens, np.flatnonzero(routed_N), recording.where
    if num_tokens is not None:
        owner_N = np.repeat(np.arange(num_tokens.size), num_tokens.ravel())
        num_tokens = np.bincount(owner_N[rows], minlength=num_tokens.size).reshape(num_tokens.shape)
    return replace(
        recording,
        ids={layer: _compacted(ids_NK, rows) for layer, ids_NK in kept.items()},
        where=lambda layer, row: where(layer, int(rows[row])),
        num_tokens=num_tokens,
        left_out=tuple(left_out),
    )


def _compacted(ids_NK: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows of an array, in its own memory: what is freed between new arrays would not go back to the system."""
    ids_NK[: len(rows)] = ids_NK[rows]
    return ids_NK[: len(rows)]


def _without_empty_columns(ids: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Experts without the last columns that are -1 throughout, where a form has more room than K."""
    width = max(ids_NK.shape[1] for ids_NK in ids.values())
    filled = width
    while filled > 1 and all((ids_NK[:, filled - 1] == NO_EXPERT).all() for ids_NK in ids.values()):
        filled -= 1
    if filled == 1 < width and all((ids_NK == NO_EXPERT).all() for ids_NK in ids.values()):
        filled = width
    return {layer: ids_NK[:, :filled] for layer, ids_NK in ids.items()}


def _zeros_of_nobody(zeros: Mapping[int, np.ndarray], source: Source) -> dict[int, np.ndarray]:
    """Which zeros are no routing at K = 1: of layers that have nothing else, and of tokens that are 0 in all others.

    Raises:
        ValueError: such tokens may have chosen expert 0 in every layer, and nothing was said.
    """
    if source.zeros == "expert":
        return {layer: np.zeros_like(each) for layer, each in zeros.items()}
    dense = {layer for layer, each in zeros.items() if each.all()}
    others = [each for layer, each in zeros.items() if layer not in dense]
    nobody_N = np.all(others, axis=0) if others else np.zeros(len(next(iter(zeros.values()))), bool)
    if source.zeros is None and nobody_N.any():
        by_chance = len(nobody_N) * np.prod([each[~nobody_N].mean() for each in others])
        if by_chance > MOST_BY_CHANCE or len(others) == 1:
            raise ValueError(_question(source.path, int(nobody_N.sum()), len(nobody_N)))
    return {layer: each if layer in dense else nobody_N for layer, each in zeros.items()}


def _question(path: Path, rows: int, count: int) -> str:
    return (
        f"{path}: K=1, and {rows} of {count} tokens are 0 in every layer, which may be expert 0 or no routing: say "
        "--zeros expert or --zeros none"
    )
