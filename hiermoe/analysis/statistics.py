"""Ratios over iterations with their intervals.

Two systems are compared over the same iterations of the same routing, so iterations are drawn as pairs. Neighbouring
iterations of a training run are alike (routers drift, a swap stays), so whole blocks of neighbours are drawn, of about
the cube root of n iterations, the growth rate that is best for a variance (Hall, Horowitz, Jing 1995). Blocks wrap
around the end (circular block bootstrap: Politis, Romano 1992), else the first and last iterations would be drawn less
often than others and a trend would shift the interval. scipy.stats.bootstrap draws single observations, which would
make the intervals too narrow here. What an interval covers is the spread over iterations of one run; it says nothing
about other trainings, models or clusters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd

CONFIDENCE = 0.95
RESAMPLES = 2000

Statistic = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: over all iterations.
        low: lower end of the interval.
        high: upper end of the interval.
        n: iterations.
    """

    value: float
    low: float
    high: float
    n: int

    def inverse(self) -> "Estimate":
        """Of 1 / x: the ratio the other way round."""
        return Estimate(1 / self.value, 1 / self.high, 1 / self.low, self.n)


def bootstrap(statistic: Statistic, *series: np.ndarray) -> Estimate:
    """A statistic of paired series and its percentile interval.

    Args:
        statistic: reduces the last axis of each series, e.g. from [n] or [resamples, n]; NaN where a resample says
            nothing, which then counts nowhere.
        series: float [n] each, in order of iteration.

    Raises:
        ValueError: series of different or no length.
    """
    lengths = {len(x) for x in series}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"series of lengths {[len(x) for x in series]}: all must have the same, not 0")
    (n,) = lengths
    drawn = block_indices(n)
    values = statistic(*(x[drawn] for x in series))
    tail = (1 - CONFIDENCE) / 2 * 100
    telling = values[~np.isnan(values)]
    low, high = np.percentile(telling, [tail, 100 - tail]) if len(telling) else (np.nan, np.nan)
    return Estimate(float(statistic(*series)), float(low), float(high), n)


@lru_cache(maxsize=16)
def block_indices(n: int) -> np.ndarray:
    """Iterations of every resample, int64 [RESAMPLES, n]: blocks of neighbours, seeded, the same for every series."""
    length = max(1, round(n ** (1 / 3)))
    starts = np.random.default_rng(0).integers(0, n, (RESAMPLES, -(-n // length)))
    return ((starts[:, :, None] + np.arange(length)) % n).reshape(RESAMPLES, -1)[:, :n]


def ratio_of_sums(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """sum(numerator) / sum(denominator)."""
    return bootstrap(lambda a, b: a.sum(-1) / b.sum(-1), numerator, denominator)


def ratio_of_medians(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """median(numerator) / median(denominator)."""
    return bootstrap(lambda a, b: np.median(a, -1) / np.median(b, -1), numerator, denominator)


def ratio_of_variation(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """Coefficient of variation (standard deviation over mean) of one series over that of another.

    Of few iterations a resample may be one of them again and again; such a one varies in neither series.
    """

    def statistic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        theirs = b.std(-1) / b.mean(-1)
        return (a.std(-1) / a.mean(-1)) / np.where(theirs > 0, theirs, np.nan)

    return bootstrap(statistic, numerator, denominator)


def paired(first: pd.DataFrame, second: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of two runs over their common iterations.

    Args:
        first: one row per iteration.
        second: one row per iteration.
        column: e.g. predicted_ms.

    Raises:
        ValueError: the runs did not walk through the same routing.
    """
    keys = ["iteration", "routing_iteration"]
    a, b = (x.set_index(keys)[column] for x in (first, second))
    if not a.index.equals(b.index):
        raise ValueError(
            f"{first['run_id'].iloc[0]} and {second['run_id'].iloc[0]} did not walk through the same steps"
        )
    return a.to_numpy(float), b.to_numpy(float)
