"""Alpha and beta from timings: what a calibration ends with (paper, Sec. V-B)."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from hiermoe.planner.cost import least_of_waves, time_in_chunks
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import AlphaBeta, Peers

# What the source of a constant begins with that was measured.
CALIBRATED = "calibrated on"
# The stages of HD2 are timed one after the other as well, in so many chunks.
CHUNKS = (1, 2, 4, 8)
COPIES = 2  # of a row of the first stage that the second one sends
TWO_STAGES = (Peers("inter", 1), Peers("intra", 1))


@dataclass(frozen=True)
class Fit:
    """The line t = alpha_ms + n * beta_ms_per_byte through timings, and its coefficient of determination."""

    alpha_ms: float
    beta_ms_per_byte: float
    r2: float

    def line(self, source: str) -> AlphaBeta:
        """As constants of an AlltoAll that nobody has published."""
        return AlphaBeta(alpha_ms=self.alpha_ms, beta_ms_per_byte=self.beta_ms_per_byte, source=source, published=False)


@dataclass(frozen=True)
class ChunkFit:
    """What `Cluster` says of chunks.

    Attributes:
        overlap: of stages, 0 to 1.
        wave_ms: least time of a wave.
        error: root mean square of relative errors of the times in several chunks.
    """

    overlap: float
    wave_ms: float
    error: float


def fit_alpha_beta(size_bytes: np.ndarray, time_ms: np.ndarray) -> Fit:
    """The line with the least squares of errors that grow with the root of the time; neither constant is negative.

    Of errors alike at all sizes the largest times would decide, by their noise, what alpha is; of relative ones the
    smallest sizes would, where a start hides the bytes, what beta is.

    Args:
        size_bytes: float [n], bytes at the busiest GPU.
        time_ms: float [n].

    Raises:
        ValueError: fewer than two different sizes.
    """
    if len(np.unique(size_bytes)) < 2:
        raise ValueError("a line needs timings of at least two different sizes")
    from hiermoe.planner.fit_bends import solve  # whose scipy takes a second, in which nothing else starts

    line, columns = solve(size_bytes, time_ms, (), power=0.5)
    unexplained, spread = ((time_ms - columns @ line) ** 2).sum(), ((time_ms - time_ms.mean()) ** 2).sum()
    alpha_ms, beta_ms_per_byte = line.tolist()
    return Fit(alpha_ms, beta_ms_per_byte, float(1 - unexplained / spread) if spread > 0 else 0.0)


def timings(records: pd.DataFrame) -> pd.DataFrame:
    """One row per AlltoAll, size and number of chunks: the slowest rank's time, median and extremes over the repeats.

    Args:
        records: of a calibration.

    Returns:
        Columns stage, chunks, bytes, median_ms, min_ms, max_ms, n, in the order in which they were measured.
    """
    slowest = records.groupby(["stage", "chunks", "bytes", "iteration"], sort=False)["wire_ms"].max()
    over_repeats = slowest.groupby(["stage", "chunks", "bytes"], sort=False)
    return over_repeats.agg(median_ms="median", min_ms="min", max_ms="max", n="size").reset_index()


def fit_exchanges(records: pd.DataFrame, cluster: Cluster) -> dict[Peers, Fit]:
    """A line through the medians of each AlltoAll over all its sizes."""
    table, found = timings(records), {}
    for exchange in cluster.exchanges:
        rows = table[table["stage"] == str(exchange)]
        found[exchange] = fit_alpha_beta(rows["bytes"].to_numpy(float), rows["median_ms"].to_numpy(float))
    return found


def fit_chunks(records: pd.DataFrame, cluster: Cluster) -> ChunkFit | None:
    """How far stages overlap and what a wave takes at least, with the least relative errors; None without timings.

    In chunks against in one as measured; of the stage that passes beside the other what its line says.

    Args:
        records: of a calibration.
        cluster: that was calibrated.
    """
    table = timings(records)
    table = table[table["stage"] == "+".join(map(str, TWO_STAGES))]
    if table["chunks"].nunique() < 2:
        return None
    by_chunks = table.pivot_table(index="bytes", columns="chunks", values="median_ms")
    whole_ms, cut = by_chunks[[1]].to_numpy(float), by_chunks.drop(columns=1)
    chunks, fits = cut.columns.to_numpy(float), fit_exchanges(records, cluster)
    size_bytes = by_chunks.index.to_numpy(float)[:, None]
    inter_ms, intra_ms = (fits[x].line(f"the timings of {x}").ms for x in TWO_STAGES)
    shorter_ms = np.minimum(inter_ms(size_bytes), intra_ms(size_bytes * COPIES))

    from scipy.optimize import least_squares  # which takes a second, in which nothing else starts

    def errors(constants: np.ndarray) -> np.ndarray:
        least_ms = least_of_waves(chunks, len(TWO_STAGES), constants[1])
        fitted = time_in_chunks(whole_ms, whole_ms - shorter_ms, chunks, constants[0], least_ms)
        return (fitted / cut.to_numpy(float) - 1).ravel()

    first = (0.5, float(np.min(cut / least_of_waves(chunks, len(TWO_STAGES), 1.0))))
    found = least_squares(errors, first, bounds=((0.0, 0.0), (1.0, np.inf)), x_scale=(1.0, max(first[1], 1e-9)))
    overlap, wave_ms = found.x.tolist()
    return ChunkFit(round(overlap, 6), wave_ms, float(np.sqrt(np.mean(found.fun**2))))
