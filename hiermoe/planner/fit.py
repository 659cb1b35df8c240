"""Alpha and beta from timings: what a calibration ends with (paper, Sec. V-B)."""

from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Fit:
    """Least-squares line t = alpha_ms + n * beta_ms_per_byte through timings, and its coefficient of determination."""

    alpha_ms: float
    beta_ms_per_byte: float
    r2: float


def fit_alpha_beta(size_bytes: np.ndarray, time_ms: np.ndarray) -> Fit:
    """Fit the line.

    Args:
        size_bytes: float [n], bytes at the busiest GPU.
        time_ms: float [n].

    Raises:
        ValueError: fewer than two different sizes.
    """
    if len(np.unique(size_bytes)) < 2:
        raise ValueError("a line needs timings of at least two different sizes")
    line = stats.linregress(size_bytes, time_ms)
    return Fit(float(line.intercept), float(line.slope), float(line.rvalue**2))
