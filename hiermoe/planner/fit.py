"""Alpha and beta from timings: what a calibration ends with (paper, Sec. V-B)."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import AlphaBeta, Peers

# What the source of a constant begins with that was measured.
CALIBRATED = "calibrated on"
# The two stages of HD2, timed at once as well.
OVERLAPPING = (Peers("inter", 1), Peers("intra", 1))


@dataclass(frozen=True)
class Fit:
    """The line t = alpha_ms + n * beta_ms_per_byte through timings, and its coefficient of determination."""

    alpha_ms: float
    beta_ms_per_byte: float
    r2: float

    def line(self, source: str) -> AlphaBeta:
        """As constants of an AlltoAll that nobody has published."""
        return AlphaBeta(alpha_ms=self.alpha_ms, beta_ms_per_byte=self.beta_ms_per_byte, source=source, published=False)


def fit_alpha_beta(size_bytes: np.ndarray, time_ms: np.ndarray) -> Fit:
    """The line whose relative errors have the least sum of squares; neither alpha nor beta is negative.

    Relative, since else the largest sizes alone decide, by their noise, what alpha is: and it is alpha that says in how
    many chunks to send. The price: where a start hides the bytes of small messages, beta comes out too low, by a fifth
    over 15 doublings of a time that is the longer of both; r^2 falls below 0.98 then.

    Args:
        size_bytes: float [n], bytes at the busiest GPU.
        time_ms: float [n].

    Raises:
        ValueError: fewer than two different sizes.
    """
    if len(np.unique(size_bytes)) < 2:
        raise ValueError("a line needs timings of at least two different sizes")
    from hiermoe.planner.fit_bends import solve  # whose scipy takes a second, in which nothing else starts

    line, columns = solve(size_bytes, time_ms, ())
    unexplained, spread = ((time_ms - columns @ line) ** 2).sum(), ((time_ms - time_ms.mean()) ** 2).sum()
    alpha_ms, beta_ms_per_byte = line.tolist()
    return Fit(alpha_ms, beta_ms_per_byte, float(1 - unexplained / spread) if spread > 0 else 0.0)


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
    """A line through the medians of each AlltoAll over all its sizes."""
    table, found = timings(records), {}
    for exchange in cluster.exchanges:
        rows = table[table["stage"] == str(exchange)]
        found[exchange] = fit_alpha_beta(rows["bytes"].to_numpy(float), rows["median_ms"].to_numpy(float))
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
