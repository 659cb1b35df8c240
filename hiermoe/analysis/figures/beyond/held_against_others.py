"""Predicted against published: ratios of times, and times, of systems and fabrics that others measured."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import DPI
from hiermoe.analysis.figures.style import SETTINGS
from hiermoe.records.whole_file import whole

FAMILIES = {  # beginning of the published system's name: label, colour (Okabe and Ito's palette)
    "low_latency": ("a message a choice (low latency)", "#CC79A7"),
    "nccl_ep": ("a message a choice (low latency)", "#CC79A7"),
    "deepep_v2": ("DeepEP V2", "#56B4E9"),
    "deepep": ("DeepEP V1", "#0072B2"),
    "hybridep": ("HybridEP", "#E69F00"),
    "uccl_ep": ("UCCL-EP", "#009E73"),
    "fusco": ("FUSCO", "#D55E00"),
    "nccl": ("NCCL", "#222222"),
    "rdma": ("rail-aligned over cross-rail", "#888888"),
    "dedup": ("HierD-AlltoAll (PlaceMoE)", "#8C6D1F"),
    "": ("another system", "#BBBBBB"),
}
MARKS = "osD^vP*X<>hdp"
BAND = 1.4


def family(system: str) -> tuple[str, str]:
    """Label and colour of a published system."""
    if system.endswith("low_latency"):
        return FAMILIES["low_latency"]
    return next(look for start, look in FAMILIES.items() if system.startswith(start))


def draw(table: pd.DataFrame, title: str) -> Figure:
    """Left: ratios and whole steps. Right: times in microseconds.

    Args:
        table: of :func:`hiermoe.analysis.others.foretold.to_table`.
        title: a sentence.
    """
    figure, (ratios, times) = style.grid(title, 1, 2, (13, 7.6))
    clusters = list(table["cluster"].unique())
    marks = dict(zip(clusters, MARKS, strict=False))
    is_absolute = table["kind"] == "absolute"
    measured_us = table["predicted_ms"] * 1e3 / np.exp(table["log_error"])
    _panel(ratios, table[~is_absolute], table["published"], table["predicted"], marks)
    _panel(times, table[is_absolute], measured_us, table["predicted_ms"] * 1e3, marks)
    ratios.set_title("how many times as fast (pale: whole steps, sign alone)")
    ratios.set_xlabel("published")
    ratios.set_ylabel("predicted, AlltoAlls alone")
    _regions(ratios, table)
    ratios.axhline(1, color="#888888", linewidth=1)
    ratios.axvline(1, color="#888888", linewidth=1)
    times.set_title("time of a dispatch, a combine or an AlltoAll (µs)")
    times.set_xlabel("published")
    times.set_ylabel("predicted")
    _legends(figure, table, marks)
    return figure


def _regions(panel: Axes, table: pd.DataFrame) -> None:
    """Words beside the rows of ratios that lie apart."""
    for start, words, offset in (
        ("fusco_one_node", "each token to one node", (-4, 12)),
        ("fusco_real", "real routing", (26, -22)),
        ("uccl_rail", "rails", (0, -20)),
        ("aws", "whole steps", (-46, 12)),
    ):
        rows = table[table["id"].str.startswith(start)]
        if len(rows):
            at = (float(np.exp(np.log(rows["published"]).mean())), float(rows["predicted"].max()))
            style.note(panel, words, at, offset, ha="center", fontsize=10, color="#555555")


def _legends(figure: Figure, table: pd.DataFrame, marks: dict[str, str]) -> None:
    """Colours of systems, marks of fabrics, below the panels."""
    systems = dict(family(name) for name in table["system"])
    handles = [Line2D([], [], marker="o", linestyle="", color=tone, label=name) for name, tone in systems.items()]
    look: dict[str, Any] = {"linestyle": "", "color": "#555555", "markerfacecolor": "none"}
    handles += [Line2D([], [], marker=mark, label=style.fabric(cluster), **look) for cluster, mark in marks.items()]
    with mpl.rc_context(SETTINGS):
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=10, handletextpad=0.3)


def _panel(panel: Axes, rows: pd.DataFrame, published: pd.Series, predicted: pd.Series, marks: dict[str, str]) -> None:
    """Points, the line of equal numbers, and the band around it."""
    ours, theirs = (values[rows.index].to_numpy(float) for values in (predicted, published))
    for (_, row), x, y in zip(rows.iterrows(), theirs, ours, strict=True):
        panel.plot(
            x,
            y,
            marks[row["cluster"]],
            color=family(row["system"])[1],
            alpha=0.3 if row["kind"] == "order" else 0.85,
            markersize=8 if row["kind"] != "absolute" else 7,
            markeredgecolor="white",
            markeredgewidth=0.6,
        )
    both = np.concatenate([ours, theirs])
    ends = np.array([both.min() / 1.25, both.max() * 1.25])
    panel.plot(ends, ends, color="#444444", linewidth=1.2, zorder=1)
    panel.fill_between(ends, ends / BAND, ends * BAND, color="#444444", alpha=0.08, linewidth=0, zorder=0)
    style.note(panel, f"within {BAND:g}", (ends[1], ends[1]), (-8, -26), ha="right", fontsize=10, color="#666666")
    for axis, setter in ((panel.xaxis, panel.set_xscale), (panel.yaxis, panel.set_yscale)):
        setter("log")
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    panel.set_xlim(*ends)
    panel.set_ylim(*ends)
    panel.set_aspect("equal")
    if ends[1] / ends[0] < 50:
        ticks = [tick for tick in (0.3, 0.5, 1, 2, 3, 5, 10) if ends[0] < tick < ends[1]]
        panel.set_xticks(ticks)
        panel.set_yticks(ticks)


def save(table: pd.DataFrame, title: str, path: Path) -> None:
    """Draw to a PNG."""
    with mpl.rc_context(SETTINGS), whole(path) as partial:
        draw(table, title).savefig(partial, dpi=DPI)
