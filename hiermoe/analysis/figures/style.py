"""How every figure looks: one colour per system, one mark per routing, one mark for what the paper published."""

import textwrap
from collections.abc import Iterable
from functools import cache
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hiermoe.model import ModelConfig
from hiermoe.policies.system import SystemConfig
from hiermoe.topology.cluster import Cluster

ROUTINGS = {
    "recorded": ("o", "recorded routing", 0.0),
    "uniform": ("s", "uniform routing", 0.5),
    "group_limited": ("^", "group-limited routing", 0.5),
    "public": ("D", "real models' routing", 0.0),
    "none": ("o", "no routing", 0.0),
}
INK = "#222222"
SETTINGS: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "legend.fontsize": 11.5,
    "figure.dpi": 100,
}


@cache
def color(system: str) -> str:
    """Colour of a system, as its file says: Okabe and Ito's palette, variants sharing one; their labels differ."""
    return SystemConfig.named(system).color


@cache
def placement(system: str) -> tuple[str, str]:
    """Name and colour of a system's policy, where placements under one dispatch are compared."""
    own = SystemConfig.named(system)
    return own.placement_label or own.label, own.placement_color or own.color


@cache
def model(name: str) -> str:
    """Name of a model for readers, as its file says; a narrow sibling is called as its model is."""
    return ModelConfig.named(name.removesuffix("_narrow")).label


@cache
def fabric(name: str) -> str:
    """Name of a cluster for readers, as its file says."""
    return Cluster.named(name).label or name


def models(table: pd.DataFrame) -> list[str]:
    """All models of a table, in its order."""
    return [str(name) for name in table["model"].unique()]


def shade(system: str, routing: str) -> tuple[float, float, float]:
    """The system's colour, paler for synthetic routing."""
    return _pale(color(system), ROUTINGS[routing][2])


def _pale(tone: str, paleness: float) -> tuple[float, float, float]:
    red, green, blue = (value + (1 - value) * paleness for value in to_rgb(tone))
    return red, green, blue


def ordered(routings: Iterable[str]) -> list[str]:
    """Routings in the order in which all figures show them."""
    present = set(routings)
    return [routing for routing in ROUTINGS if routing in present]


def grid(title: str, rows: int, columns: int, size: tuple[float, float], **axes: object) -> tuple[Figure, list[Axes]]:
    """A figure with panels and, as its title, what is to be seen.

    Args:
        title: a sentence.
        rows: of panels.
        columns: of panels.
        size: of the figure, in inches.
        **axes: of ``Figure.subplots`` (sharex, sharey, width_ratios).

    Returns:
        The figure and its panels, row by row.
    """
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, **axes)  # type: ignore[arg-type]
        longest = int(size[0] * 8.2)
        lines = -(-len(title) // longest)
        wrapped = textwrap.fill(title, longest if lines == 1 else min(longest, len(title) // lines + 8))
        figure.suptitle(wrapped, x=0.01, ha="left", fontsize=13.5, fontweight="bold")
    return figure, list(panels.flat)


def note(panel: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **look: Any) -> None:
    """Words beside a point, moved by an offset in points."""
    panel.annotate(text, at, offset, textcoords="offset points", **look)


def published(panel: Axes, x: float, y: float, size: float = 11) -> None:
    """A published number: an open diamond, everywhere."""
    panel.plot(
        x, y, "D", markersize=size, markerfacecolor="none", markeredgecolor="black", markeredgewidth=1.8, zorder=5
    )


def ours(panel: Axes, row: pd.Series, x: float, y: float, vertical: bool = False, size: float = 9) -> None:
    """A number of ours: a filled mark with its interval.

    Args:
        panel: where.
        row: has system, routing, value, low, high.
        x: position.
        y: position.
        vertical: the value runs along y.
        size: of the mark, in points.
    """
    tone = shade(row["system"], row["routing"])
    error = [[max(row["value"] - row["low"], 0)], [max(row["high"] - row["value"], 0)]]
    panel.errorbar(
        x,
        y,
        **{"yerr" if vertical else "xerr": error},  # type: ignore[arg-type]
        fmt=ROUTINGS[row["routing"]][0],
        markersize=size,
        color=tone,
        markeredgecolor=color(row["system"]),
        ecolor=color(row["system"]),
        elinewidth=1.6,
        capsize=3,
        zorder=4,
    )


def dot_rows(panel: Axes, table: pd.DataFrame, systems: list[str], labels: dict[str, str]) -> None:
    """One row per system, one mark per routing in it, the published number beside them.

    Args:
        panel: where.
        table: columns system, routing, value, low, high, published (NaN where there is none).
        systems: from top to bottom.
        labels: of the systems.
    """
    routings = ordered(table["routing"])
    step = 0.62 / max(len(routings), 1)
    for position, system in enumerate(systems):
        rows = table[table["system"] == system]
        for _, row in rows.iterrows():
            offset = (routings.index(row["routing"]) - (len(routings) - 1) / 2) * step
            ours(panel, row, row["value"], position + offset)
        known = rows["published"].dropna()
        if len(known):
            published(panel, known.iloc[0], position)
    panel.set_yticks(range(len(systems)), [labels[system] for system in systems])
    panel.set_ylim(len(systems) - 0.45, -0.55)
    panel.grid(axis="y", visible=False)
    for position in range(1, len(systems), 2):
        panel.axhspan(position - 0.5, position + 0.5, color="#F5F5F5", zorder=0)


def legend(
    figure: Figure,
    routings: Iterable[str],
    with_published: bool = True,
    extra: Iterable[Line2D] = (),
    columns: int = 3,
) -> None:
    """What marks mean, below the panels; in so many columns where they are more than four."""
    marks = [
        Line2D([], [], marker=mark, linestyle="", markersize=9, color=_pale("#444444", paleness), label=name)
        for mark, name, paleness in (ROUTINGS[routing] for routing in ordered(routings))
    ]
    if with_published:
        diamond: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": "black", "markeredgewidth": 1.8}
        marks.append(Line2D([], [], marker="D", linestyle="", markersize=9, label="published", **diamond))
    handles = [*marks, *extra]
    with mpl.rc_context(SETTINGS):
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=len(handles) if len(handles) < 5 else columns,
            fontsize=11.5,
        )
