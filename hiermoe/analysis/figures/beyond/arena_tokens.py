"""From how many tokens a GPU on copies of experts pay, on three clusters."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.beyond import arena_rows
from hiermoe.analysis.figures.beyond.arena_rows import CELL, MAKES, WHAT, WITHOUT
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.frames import Results

TOKENS = "arena_tokens"
TIMES = {"net_ms": "net", "layer_ms": "with experts"}


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per system, cluster and number of tokens: how much faster it is than each system without copies.

    Columns ``net_over_hd_moe`` and the like: their time over its own, above 1 where it pays.
    """
    found = arena_rows.rows(results, (TOKENS,))
    if found.empty:
        return found
    for name in WITHOUT:
        for time in TIMES:
            theirs = found[found["system"] == name].set_index(CELL)[time].rename("theirs")
            joined = found.join(theirs, on=CELL)
            found = found.assign(**{_over(time, name): joined["theirs"] / joined[time]})
    return found.reset_index(drop=True)


def _over(time: str, name: str) -> str:
    return f"{time.removesuffix('_ms')}_over_{name}"


def break_even(tokens: np.ndarray, ratio: np.ndarray) -> float:
    """Tokens a GPU from which on a system pays, up to the most that were tried.

    Args:
        tokens: rising.
        ratio: the others' time over its own, at each.

    Returns:
        Between two numbers of tokens by a line through the logarithms; the first where it always pays; infinite where
        it does not pay in the end.
    """
    pays = ratio > 1
    if not pays[-1]:
        return math.inf
    last = np.flatnonzero(~pays)
    if not len(last):
        return float(tokens[0])
    low = int(last[-1])
    x, y = np.log(tokens[low : low + 2]), np.log(ratio[low : low + 2])
    return float(np.exp(x[0] - y[0] * (x[1] - x[0]) / (y[1] - y[0])))


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A column per cluster; net time above, with experts below; a line per system, over HD-MoE."""
    clusters = [str(name) for name in table["cluster"].unique()]
    figure, panels = style.grid(title, 2, len(clusters), (12, 8.4), sharex=True, sharey="row")
    shown = table[~table["system"].isin(("megatron", WITHOUT[0]))]
    marks = arena_rows.marks(shown)
    for position, panel in enumerate(panels):
        line, column = divmod(position, len(clusters))
        over = _over([*TIMES][line], WITHOUT[0])
        rows = shown[shown["cluster"] == clusters[column]].sort_values("tokens")
        for system, (tone, marker) in marks.items():
            own = rows[rows["system"] == system]
            dashed = "--" if system in WITHOUT else "-"
            panel.plot(own["tokens"], own[over], dashed, color=tone, marker=marker, markersize=7, linewidth=1.8)
        panel.axhline(1, color=style.INK, linewidth=1.5, zorder=1)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        panel.set_xticks(sizes := sorted(table["tokens"].unique()), [f"{size:.0f}" for size in sizes])
        panel.minorticks_off()
        if line == 0:
            panel.set_title(style.fabric(clusters[column]), fontsize=11)
        else:
            panel.set_xlabel("tokens a GPU")
    for line, what in enumerate(TIMES.values()):
        panels[line * len(clusters)].set_ylabel(f"times as fast as HD-MoE, {what}")
    style.legend(figure, [], with_published=False, extra=arena_rows.handles(shown, "-"), columns=5)
    return figure


def words(table: pd.DataFrame) -> Words:
    """Where each system with copies begins to pay."""
    header = (
        "cluster",
        "system",
        *(f"{what}: over {_label(table, name)}" for what in TIMES.values() for name in WITHOUT),
    )
    rows, paying, smallest = [], 0, table["tokens"].min()
    with_copies = table[table["slots_gb"] > 0]
    for (cluster, system), own in with_copies.groupby(["cluster", "system"], sort=False):
        own = own.sort_values("tokens")
        ends = [
            break_even(own["tokens"].to_numpy(float), own[_over(time, name)].to_numpy(float))
            for time in TIMES
            for name in WITHOUT
        ]
        paying += math.isfinite(ends[0])
        named = own["label"].iloc[0] if system else ""
        rows.append((style.fabric(str(cluster)), str(named), *(_tokens(end, smallest) for end in ends)))
    text = []
    for cluster, own in table.groupby("cluster", sort=False):
        at_most = own[own["tokens"] == own["tokens"].max()]
        best = [at_most.nsmallest(1, time).iloc[0] for time in TIMES]
        text.append(
            f"{style.fabric(str(cluster))}, {best[0]['tokens']:.0f} tokens: least net time {best[0]['label']} "
            f"({best[0]['net_ms']:.2f} ms), with experts {best[1]['label']} ({best[1]['layer_ms']:.2f} ms)."
        )
    return Words(
        f"In {paying} of {len(rows)} pairs of a system with copies and a cluster, copies have paid for what they send "
        f"by {table['tokens'].max():.0f} tokens a GPU, over HD-MoE",
        f"HD-MoE's time over a system's; above 1 it is faster. 32 GPUs, {style.model(str(table['model'].iloc[0]))}, "
        f"recorded sequences drawn anew, mean of {table['n'].min():.0f} iterations, simulated. Dashed: no copies. The "
        f"other clusters' constants are from data sheets. {WHAT}",
        tuple(text),
        (header, *rows),
    )


def _label(table: pd.DataFrame, system: str) -> str:
    return str(table.loc[table["system"] == system, "label"].iloc[0])


def _tokens(end: float, smallest: float) -> str:
    if not math.isfinite(end):
        return "never"
    return f"from {end:.0f}" if end > smallest else f"always (from {smallest:.0f})"


FIGURE = FigureSpec(
    "arena_tokens",
    "Beyond the paper: from how many tokens copies of experts pay",
    TOKENS,
    table,
    draw,
    words,
    {"simulated": MAKES},
)
