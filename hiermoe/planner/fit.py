"""Alpha and beta from timings: what a calibration ends with (paper, Sec. V-B)."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import AlphaBeta, Peers

# Below, start-up decides and the line is not one.
SMALLEST_FITTED_BYTES = 64 * 1024
# What the source of a constant begins with that was measured.
CALIBRATED = "calibrated on"
# The two stages of HD2, timed at once as well.
OVERLAPPING = (Peers("inter", 1), Peers("intra", 1))


@dataclass(frozen=True)
class Fit:
    """Least-squares line t = alpha_ms + n * beta_ms_per_byte through timings, and its coefficient of determination."""

    alpha_ms: float
    beta_ms_per_byte: float
    r2: float

    def line(self, source: str) -> AlphaBeta:
        """As constants of an AlltoAll that nobody has published."""
        return AlphaBeta(alpha_ms=self.alpha_ms, beta_ms_per_byte=self.beta_ms_per_byte, source=source, published=False)


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
    from scipy import stats  # a second, in which nothing else of the suite starts

    line = stats.linregress(size_bytes, time_ms)
    return Fit(float(line.intercept), float(line.slope), float(line.rvalue**2))


def timings(records: pd.DataFrame) -> pd.DataFrame:
    """One row per AlltoAll and size: what the slowest rank took, median and extremes over the repeats.

    Args:
        records: of a calibration.

    Returns:
        Columns stage, bytes, median_ms, min_ms, max_ms, n, in the order in which they were measured.
    """
    slowest = records.groupby(["stage", "bytes", "iteration"], sort=False)["wire_ms"].max()
    over_repeats = slowest.groupby(["stage", "bytes"], sort=False)
    return over_repeats.agg(median_ms="median", min_ms="min", max_ms="max", n="size").reset_index()


def fit_exchanges(records: pd.DataFrame, cluster: Cluster) -> dict[Peers, Fit]:
    """A line through the medians of each AlltoAll, above 64 KiB at the busiest GPU; alpha and beta are not negative.

    Raises:
        ValueError: fewer than two sizes above that.
    """
    table = timings(records)
    fitted = table[table["bytes"] > SMALLEST_FITTED_BYTES]
    found = {}
    for exchange in cluster.exchanges:
        rows = fitted[fitted["stage"] == str(exchange)]
        found[exchange] = _line(rows["bytes"].to_numpy(float), rows["median_ms"].to_numpy(float))
    return found


def fit_overlap(records: pd.DataFrame, cluster: Cluster) -> float | None:
    """How far the stages of HD2 overlap when they run at a time, see `Cluster.overlap`; None where that was not timed.

    Of each size, what both together take less than one after the other, by the fitted lines, over the time of the
    shorter one; median over sizes.
    """
    table = timings(records)
    both = table[table["stage"] == "+".join(map(str, OVERLAPPING))]
    if both.empty:
        return None
    fits, size_bytes = fit_exchanges(records, cluster), both["bytes"].to_numpy(float)
    lines = (fits[x].line(f"the timings of {x}") for x in OVERLAPPING)
    one, other = (line.ms(size_bytes) for line in lines)
    shares = (one + other - both["median_ms"].to_numpy(float)) / np.minimum(one, other)
    return float(np.clip(np.median(shares), 0.0, 1.0))


def _line(size_bytes: np.ndarray, time_ms: np.ndarray) -> Fit:
    """The least-squares line; where noise makes alpha or beta negative, the best one among those without."""
    fit = fit_alpha_beta(size_bytes, time_ms)
    if fit.alpha_ms >= 0 and fit.beta_ms_per_byte >= 0:
        return fit
    from scipy.optimize import nnls

    scale = size_bytes.max()  # both columns of a size, for the solver's sake
    (alpha_ms, slope), _ = nnls(np.column_stack([np.ones_like(size_bytes), size_bytes / scale]), time_ms)
    unexplained = ((time_ms - alpha_ms - slope * size_bytes / scale) ** 2).sum()
    r2 = 1 - unexplained / ((time_ms - time_ms.mean()) ** 2).sum()
    return Fit(float(alpha_ms), float(slope / scale), float(r2))
