"""What the page shows of times and traffic; placement and sensitivity are in ``figures_of_change``."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy.optimize import isotonic_regression

from hiermoe.advice.answer_tables import Answer, groups_of
from hiermoe.advice.systems import BASELINE
from hiermoe.analysis.figures import style
from hiermoe.analysis.whole_step import PUBLISHED_SHARES, step_speedup
from hiermoe.topology.peers import WORLD, Peers

SLOWEST_SHOWN = 1.6  # times the flat AlltoAll
STAGE_TONES = ("#4477AA", "#88BBDD", "#EE9944", "#F5CC99", "#66AA77", "#AADDAA", "#AA6699", "#DDAACC", "#999944")


def overview(answer: Answer, title: str) -> Figure:
    """Left: AlltoAll time, the best of every family of systems. Right: the whole step against AlltoAll's share."""
    figure, (left, right) = style.grid(title, 1, 2, (13, 5.2), width_ratios=(1.1, 1))
    rows = best_of_families(answer)
    _time_bars(left, rows[rows["step_ms"] <= SLOWEST_SHOWN * answer.flat_ms].iloc[::-1], answer)
    _step_curves(right, answer)
    return figure


def best_of_families(answer: Answer) -> pd.DataFrame:
    """Of systems that share a colour the fastest, and the recommended one; by rising time."""
    table = answer.systems[~answer.systems["lossy"]]
    best = table.assign(tone=[answer.color(name) for name in table["system"]]).drop_duplicates("tone")["system"]
    return table[table["system"].isin([*best, answer.found.chosen])]


def _time_bars(panel: Axes, rows: pd.DataFrame, answer: Answer) -> None:
    panel.barh(range(len(rows)), rows["step_ms"], 0.66, color=[answer.color(name) for name in rows["system"]])
    for position, (_, row) in enumerate(rows.iterrows()):
        text = f"{row['step_ms']:.3g} ms" if row["system"] == BASELINE else f"{row['speedup']:.2f}×"
        panel.annotate(
            text + answer.mark, (row["step_ms"], position), xytext=(5, 0), textcoords="offset points", va="center"
        )
    _name_rows(panel, rows, answer)
    panel.set_xlim(0, float(rows["step_ms"].max()) * 1.16)
    panel.set_xlabel("predicted AlltoAll time of a step and layer, ms")
    panel.set_title("AlltoAll: the best of every family")


def _name_rows(panel: Axes, rows: pd.DataFrame, answer: Answer) -> None:
    panel.set_yticks(range(len(rows)), list(rows["label"]))
    for tick, name in zip(panel.get_yticklabels(), rows["system"], strict=True):
        tick.set_fontweight("bold" if name == answer.found.chosen else "normal")
    panel.grid(axis="y", visible=False)


def _step_curves(panel: Axes, answer: Answer) -> None:
    low, high = PUBLISHED_SHARES
    panel.axvspan(low * 100, high * 100, color="#F1F1F1", zorder=0)
    panel.annotate(
        "the paper's 30–60 %",
        ((low + high) * 50, 0.98),
        xycoords=("data", "axes fraction"),
        ha="center",
        va="top",
        color="#777777",
        fontsize=10.5,
    )
    shares = answer.end_to_end["alltoall_share"] * 100
    ends = []
    for name in answer.end_to_end.columns[1:]:
        values = answer.end_to_end[name]
        followed = name == answer.followed
        panel.plot(
            shares, values, "-" if followed else "--", color=answer.color(name), linewidth=2.6 if followed else 1.8
        )
        ends.append((float(values.iloc[-1]), answer.label(name), answer.color(name)))
    panel.axhline(1, color=answer.color(BASELINE), linewidth=1.2)
    panel.set_xlim(0, float(shares.iloc[-1]))
    end_labels(panel, ends)
    share = answer.assessment.case.share
    if share is not None:
        value = float(step_speedup(share, answer.communication(answer.followed)))
        panel.plot([share * 100] * 2, [panel.get_ylim()[0], value], color=style.INK, linestyle=":", linewidth=1.4)
        panel.plot(share * 100, value, "o", color=style.INK, markersize=8, zorder=6)
        panel.annotate(
            f"at {share:.0%}: {value:.2f}×{answer.mark}",
            (share * 100, value),
            xytext=(-9, 7),
            textcoords="offset points",
            ha="right",
            fontweight="bold",
        )
    panel.set_xlabel("AlltoAll's share of the step now, %")
    panel.set_ylabel("speed-up of the step")
    panel.set_title("The whole step, moving experts included")


def end_labels(panel: Axes, ends: Sequence[tuple[float, str, str]], apart: float = 0.062) -> None:
    """Names at the right end of lines, moved apart where they would overlap.

    Args:
        panel: where.
        ends: last value, name and colour of each line.
        apart: least distance, of the panel's height.
    """
    low, high = panel.get_ylim()
    panel.set_ylim(low, high)
    ordered = sorted(ends)
    wanted = np.clip([(value - low) / (high - low) for value, _, _ in ordered], 0, 1)
    room = apart * np.arange(len(wanted))
    positions = isotonic_regression(wanted - room).x + room  # the nearest to where they belong, least squares
    positions -= max(float(positions[-1]) - 1.0, 0.0)
    for (_, label, colour), end, at in zip(ordered, wanted, positions, strict=True):
        panel.annotate(
            label,
            (1, end),
            xytext=(1.05, at),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=10.5,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0},
        )


def systems(answer: Answer, title: str) -> Figure:
    """A bar per system, made of its stages."""
    rows = answer.systems[answer.systems["step_ms"] <= SLOWEST_SHOWN * answer.flat_ms].iloc[::-1]
    figure, (panel,) = style.grid(title, 1, 1, (12, 1.9 + 0.34 * len(rows)))
    words, shown = answer.stage_words(), dict[Peers, None]()
    for position, (_, row) in enumerate(rows.iterrows()):
        left = 0.0
        for peers in words:
            ms = row.get(f"{peers}_ms", np.nan)
            if ms > 0:
                shown[peers] = None
                panel.barh(
                    position, ms, 0.7, left=left, color=_stage_tone(peers, words), edgecolor="white", linewidth=0.7
                )
                left += ms
        text = f"{row['speedup']:.2f}×{answer.mark}, d = {row['dimensions']}{', drops tokens' if row['lossy'] else ''}"
        panel.annotate(text, (left, position), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10.5,
                       bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    _name_rows(panel, rows, answer)
    panel.set_ylim(-0.6, len(rows) - 0.4)
    panel.set_xlim(0, float(rows["step_ms"].max()) * 1.25)
    panel.axvline(
        float(rows.loc[rows["system"] == BASELINE, "step_ms"].iloc[0]),
        color=style.INK,
        linewidth=1,
        linestyle=":",
        zorder=1,
    )
    panel.set_xlabel("predicted AlltoAll time of a step and layer, ms")
    marks = [Patch(color=_stage_tone(peers, words), label=words[peers]) for peers in words if peers in shown]
    figure.legend(handles=marks, loc="outside lower center", ncols=min(len(marks), 4), fontsize=11)
    return figure


def _stage_tone(peers: Peers, words: dict[Peers, str]) -> str:
    return "#555555" if peers == WORLD else STAGE_TONES[(list(words).index(peers) - 1) % len(STAGE_TONES)]


def traffic(answer: Answer, title: str) -> Figure:
    """Left: duplication at every level. Right: bytes that cross every level."""
    figure, (left, right) = style.grid(title, 1, 2, (13, 4.6))
    levels = answer.assessment.levels
    at = np.arange(len(levels))
    left.bar(at, levels["duplication"] * 100, 0.55, color="#88BBDD", label=f"this routing{answer.mark}")
    left.plot(
        at, levels["independent"] * 100, "D", color="black", markerfacecolor="white", markersize=9,
        label="all experts equally likely",
    )  # fmt: skip
    top = float(levels[["duplication", "independent"]].max().max()) * 100
    for x, row in zip(at, levels.itertuples(), strict=True):
        value = row.duplication * 100  # type: ignore[operator]
        highest = max(value, row.independent * 100)  # type: ignore[operator, call-overload]
        left.annotate(f"{value:.0f} %", (float(x), highest), xytext=(0, 10), textcoords="offset points", ha="center")
    left.set_xticks(
        at, [f"{n} {groups_of(str(name))}" for n, name in zip(levels["groups"], levels["name"], strict=True)]
    )
    left.set_ylim(0, max(top * 1.35, 10))
    left.set_ylabel("of token–expert pairs, %")
    left.set_title("Copies that deduplication saves")
    left.legend(loc="upper right")
    left.grid(axis="x", visible=False)
    names = list(answer.crossing.columns[2:])
    for i, name in enumerate(names):
        offset = (i - (len(names) - 1) / 2) * 0.8 / len(names)
        megabytes = answer.crossing[name] / 1e6
        bars = right.bar(at + offset, megabytes, 0.76 / len(names), color=answer.color(name), label=answer.label(name))
        right.bar_label(bars, labels=[f"{x:.3g}" for x in megabytes], fontsize=10, padding=2)
    right.set_xticks(at, [f"between {groups_of(str(name))}" for name in answer.crossing["name"]])
    right.set_ylabel(f"MB a GPU sends in one AlltoAll{answer.mark}")
    right.set_title("What crosses each level")
    right.margins(y=0.3)
    right.legend(loc="upper right", ncols=len(names))
    right.grid(axis="x", visible=False)
    return figure
