"""Fig. 9: the seven AlltoAlls' lines, and a fit of noisy points made from them."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hiermoe.analysis.claims import TESTBED_RANKS, Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.frames import Results
from hiermoe.analysis.quantities import fits
from hiermoe.topology.peers import WORLD, AlphaBeta, Peers

NAMES = {"world": "standard, all GPUs", "inter": "Inter-level-", "intra": "Intra-level-"}
TONES = {"world": "#000000", "inter": "#0072B2", "intra": "#D55E00"}
DASHES = {0: "-", 1: "-", 2: "--", 3: ":"}


def words_of(peers: Peers) -> tuple[str, str]:
    """Kind of an AlltoAll, and its name in the paper."""
    kind = "world" if peers == WORLD else peers.kind
    return kind, NAMES[kind] + (str(peers.level) if peers.level else "")


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per AlltoAll and size: mean, smallest and largest timing, published and fitted constants."""
    rows = []
    for run in results.find("fig9", status="ok", num_ranks=TESTBED_RANKS):
        timings = results.rows(run, "calibration")
        for peers, fit in fits(run, results).items():
            constants = run.config.cluster.constants(peers)
            kind, name = words_of(peers)
            for size, group in timings[timings["stage"] == str(peers)].groupby("bytes"):
                time_ms = group["predicted_ms"]
                rows.append(
                    {
                        "source": run.source, "routing": run.routing, "stage": name, "kind": kind,
                        "level": peers.level, "bytes": size, "mean_ms": time_ms.mean(), "min_ms": time_ms.min(),
                        "max_ms": time_ms.max(), "n": len(group), "alpha_ms": constants.alpha_ms,
                        "beta_ms_per_byte": constants.beta_ms_per_byte, "fitted_alpha_ms": fit.alpha_ms,
                        "fitted_beta_ms_per_byte": fit.beta_ms_per_byte, "r2": fit.r2,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, title: str) -> Figure:
    """Lines from the published constants, points from the synthetic timings, fitted r2 at the end of each line."""
    figure, (panel,) = style.grid(title, 1, 1, (10, 6))
    sizes = np.geomspace(table["bytes"].min(), table["bytes"].max(), 100)
    ends = []
    for stage, rows in table.groupby("stage", sort=False):
        first = rows.iloc[0]
        tone = TONES[first["kind"]]
        constants = {name: first[name] for name in ("alpha_ms", "beta_ms_per_byte")}
        line = AlphaBeta(**constants, source="the table").ms(sizes)
        panel.plot(sizes / 1e6, line, color=tone, linestyle=DASHES[first["level"]])
        panel.plot(rows["bytes"] / 1e6, rows["mean_ms"], "o", color=tone, markersize=5)
        ends.append((line[-1], f"{stage}  r² {first['r2']:.5f}", tone))
    panel.set(xscale="log", yscale="log", xlabel="bytes at the busiest GPU, MB", ylabel="time of one AlltoAll, ms")
    top = None
    for end, label, tone in sorted(ends, reverse=True):  # direct labels, pushed apart where lines end close together
        position = end if top is None else min(end, top / 1.42)
        panel.annotate(label, (sizes[-1] / 1e6 * 1.15, position), color=tone, va="center", fontsize=11.5)
        top = position
    panel.set_xlim(right=sizes[-1] / 1e6 * 30)
    panel.set_xticks([0.1, 1, 10, 100])
    panel.minorticks_off()
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    return figure


def words(table: pd.DataFrame) -> Words:
    """How well the fit finds the constants back."""
    fitted = table.drop_duplicates("stage")
    beta = (fitted["fitted_beta_ms_per_byte"] / fitted["beta_ms_per_byte"] - 1).abs()
    alpha = (fitted["fitted_alpha_ms"] / fitted["alpha_ms"] - 1).abs()
    by_rate = fitted.sort_values("beta_ms_per_byte")
    fast, slow = by_rate.iloc[0], by_rate.iloc[-1]
    return Words(
        f"A fit of points made from the published lines gives them back (r² ≥ {fitted['r2'].min():.4f})",
        f"Lines: α + n·β with the published constants. Points: mean of n = {table['n'].iloc[0]} synthetic timings with "
        "multiplicative noise; r² of the line fitted through all of them. A self-test of the calibration, not a "
        "measurement: by construction.",
        (
            f"Fitted β is within {beta.max():.1%} of the constant that the points were made from, fitted α within "
            f"{alpha.max():.0%}: noise is relative, so large messages set the slope and hardly anything sets α.",
            f"A byte in the dearest exchange ({slow['stage']}) costs "
            f"{slow['beta_ms_per_byte'] / fast['beta_ms_per_byte']:.0f} times a byte in the cheapest "
            f"({fast['stage']}): what leaves a node decides the time.",
            "No routing enters this figure.",
        ),
    )


FIGURE = FigureSpec("fig9", "Fig. 9: what an AlltoAll costs", "fig9", table, draw, words)
