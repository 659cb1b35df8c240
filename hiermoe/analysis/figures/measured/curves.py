"""What nccl-tests measured of a cluster's AlltoAlls, the curves through it, and how far off they are."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.paper import fig9
from hiermoe.analysis.figures.spec import DPI
from hiermoe.analysis.figures.style import SETTINGS
from hiermoe.planner.nccl_exchanges import Exchanged
from hiermoe.records.whole_file import whole


def draw(exchanges: Sequence[Exchanged], title: str) -> Figure:
    """Left: time against size with the curves; right: measured over fitted, less 1."""
    figure, (times, errors) = style.grid(title, 1, 2, (12, 5.4))
    for number, one in enumerate(exchanges):
        colour, order = f"C{number}", np.argsort(one.size_bytes)
        sizes, ms = one.size_bytes[order], one.time_ms[order]
        times.plot(sizes, ms, "o", color=colour, markersize=4)
        fine = np.geomspace(sizes[0], sizes[-1], 300)
        times.plot(fine, one.fit.constants.ms(fine), color=colour, label=fig9.words_of(one.peers)[1])
        errors.plot(sizes, 100 * one.fit.residuals[order], "o-", color=colour, markersize=4, linewidth=0.8)
    times.set_xscale("log")
    times.set_yscale("log")
    times.set_xlabel("bytes of a GPU, its own share included")
    times.set_ylabel("ms")
    times.legend()
    errors.axhline(0, color="#333333", linewidth=1)
    errors.set_xscale("log")
    errors.set_xlabel("bytes of a GPU")
    errors.set_ylabel("measured over the curve, less 1 (%)")
    return figure


def save(exchanges: Sequence[Exchanged], title: str, path: Path) -> None:
    """Draw to a PNG."""
    with mpl.rc_context(SETTINGS), whole(path) as partial:
        draw(exchanges, title).savefig(partial, dpi=DPI)
