"""What routing would be if a token's experts had nothing to do with each other: same loads, no structure."""

import numpy as np

from hiermoe.routing.trace import has_twice

_ROUNDS = 20_000  # of which usual loads take a dozen


def drawn_independently(ids_NK: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Experts dealt out anew among the tokens, each as often as before.

    What is left of duplication then comes from the loads alone. A router's group limit is not kept.

    Args:
        ids_NK: integer [token, K], no expert twice in a token.
        rng: where the draw comes from.

    Returns:
        Like ``ids_NK``.

    Raises:
        ValueError: an expert is so common that no draw without a repetition was found.
    """
    dealt = rng.permuted(ids_NK.ravel()).reshape(ids_NK.shape)
    bad = np.flatnonzero(has_twice(dealt))
    for _ in range(_ROUNDS):
        if not len(bad):
            return dealt
        _exchange(dealt, bad, rng)  # which makes no other token bad
        bad = bad[has_twice(dealt[bad])]
    raise ValueError(f"{len(bad)} of {len(dealt)} tokens still have an expert twice: the loads leave hardly a choice")


def _exchange(dealt_NK: np.ndarray, bad: np.ndarray, rng: np.random.Generator) -> None:
    """Exchange one repeated choice of each such token with a random one, where neither token gets worse by it."""
    order = np.argsort(dealt_NK[bad], axis=1, kind="stable")
    ordered = np.take_along_axis(dealt_NK[bad], order, axis=1)
    again = ordered[:, 1:] == ordered[:, :-1]
    repeated = np.take_along_axis(order[:, 1:], again.argmax(axis=1)[:, None], axis=1)[:, 0]
    other, slot = rng.integers(len(dealt_NK), size=len(bad)), rng.integers(dealt_NK.shape[1], size=len(bad))
    gives, takes = dealt_NK[bad, repeated], dealt_NK[other, slot]
    good = ~(dealt_NK[other] == gives[:, None]).any(axis=1) & ~(dealt_NK[bad] == takes[:, None]).any(axis=1)
    good &= ~np.isin(other, bad)  # and no token is part of two exchanges
    good[good] &= np.bincount(other[good], minlength=len(dealt_NK))[other[good]] == 1
    dealt_NK[bad[good], repeated[good]], dealt_NK[other[good], slot[good]] = takes[good], gives[good]
