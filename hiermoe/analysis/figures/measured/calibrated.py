"""Fig. 9 of a cluster that was calibrated: measured timings, and the lines fitted to them."""

from pathlib import Path

import matplotlib as mpl
import pandas as pd

from hiermoe.analysis.figures.paper import fig9
from hiermoe.analysis.figures.spec import DPI
from hiermoe.analysis.figures.style import SETTINGS
from hiermoe.planner.fit import timings
from hiermoe.records.whole_file import whole
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import Peers


def table(records: pd.DataFrame, cluster: Cluster, r2: dict[Peers, float]) -> pd.DataFrame:
    """One row per AlltoAll and size, with the columns that Fig. 9 draws; times are medians over repeats.

    Args:
        records: of the calibration.
        cluster: with the fitted constants.
        r2: of each fit.
    """
    measured = timings(records).rename(columns={"median_ms": "mean_ms"})
    frames = []
    for exchange in cluster.exchanges:
        constants = cluster.constants(exchange)
        kind, name = fig9.words_of(exchange)
        frames.append(
            measured[measured["stage"] == str(exchange)].assign(
                stage=name,
                kind=kind,
                level=exchange.level,
                alpha_ms=constants.alpha_ms,
                beta_ms_per_byte=constants.beta_ms_per_byte,
                r2=r2[exchange],
            )
        )
    return pd.concat(frames, ignore_index=True)


def save(points: pd.DataFrame, title: str, path: Path) -> None:
    """Draw the table to a PNG."""
    with mpl.rc_context(SETTINGS), whole(path) as partial:
        fig9.draw(points, title).savefig(partial, dpi=DPI)
