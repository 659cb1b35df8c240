"""Collapsed routing is told from skewed, few and balanced choices."""

import numpy as np
import pytest

from hiermoe.routing.collapse import collapse


@pytest.mark.parametrize(
    ("load_E", "said"),
    [
        (np.r_[np.full(8, 100), np.zeros(120)], "99% of all choices fall on 8 of 128 experts, 120 are never chosen"),
        (np.r_[np.full(8, 10**6), np.full(120, 5)], "99% of all choices fall on 8 of 128 experts"),
        (np.r_[np.zeros(63), 1000], "99% of all choices fall on 1 of 64 experts, 63 are never chosen"),
        (np.full(128, 10), None),
        (1000 / np.arange(1, 129.0), None),  # Zipf's law
        (np.r_[np.full(100, 100), np.zeros(28)], None),
        (np.r_[np.ones(8), np.zeros(120)], None),  # one token of eight experts
        (np.zeros(8), None),
    ],
)
def test_collapse(load_E: np.ndarray, said: str | None) -> None:
    assert collapse(load_E) == said
