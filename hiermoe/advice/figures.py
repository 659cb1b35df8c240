"""What the page shows of times and traffic; placement and sensitivity are in ``figures_of_change``."""

from collections.abc import Sequence
from itertools import chain, cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from hiermoe.advice.answer_tables import Answer, exchange_words
from hiermoe.advice.systems import BASELINE
from hiermoe.analysis.figures import style
from hiermoe.analysis.whole_step import PUBLISHED_SHARES

SLOWEST_SHOWN = 1.6  # times the flat AlltoAll
FLAT_TONE = "#555555"
STAGE_TONES = ("#4477AA", "#88BBDD", "#EE9944", "#F5CC99", "#66AA77", "#AADDAA", "#AA6699", "#DDAACC", "#999944")


def overview(answer: Answer, title: str) -> Figure:
    """Left: AlltoAll time, the best of every family of systems. Right: the whole step against AlltoAll's share."""
    figure, (left, right) = style.grid(title, 1, 2, (13, 5.2), width_ratios=(1.1, 1))
    rows = _shown(best_of_families(answer), answer)
    bars = left.barh(range(len(rows)), rows["step_ms"], 0.66, color=[answer.color(name) for name in rows["system"]])
    beside = [f"{row.step_ms:.3g} ms" if row.system == BASELINE else f"{row.speedup:.2f}×" for row in rows.itertuples()]
    left.bar_label(bars, [text + answer.mark for text in beside], padding=5)
    _name_rows(left, rows, answer)
    left.set_xlim(0, float(rows["step_ms"].max()) * 1.16)
    left.set_title("AlltoAll: the best of every family")
    _step_curves(right, answer)
    return figure


def best_of_families(answer: Answer) -> pd.DataFrame:
    """Of systems that share a colour the fastest, and the recommended one; by rising time."""
    table = answer.systems[~answer.systems["lossy"]]
    best = table.assign(tone=[answer.color(name) for name in table["system"]]).drop_duplicates("tone")["system"]
    return table[table["system"].isin([*best, answer.found.chosen])]


def _shown(rows: pd.DataFrame, answer: Answer) -> pd.DataFrame:
    """From bottom to top, without those that would make the others too short to see."""
    return rows[rows["step_ms"] <= SLOWEST_SHOWN * answer.flat_ms].iloc[::-1]


def _name_rows(panel: Axes, rows: pd.DataFrame, answer: Answer) -> None:
    panel.set_yticks(range(len(rows)), list(rows["label"]))
    for tick, name in zip(panel.get_yticklabels(), rows["system"], strict=True):
        tick.set_fontweight("bold" if name == answer.found.chosen else "normal")
    panel.grid(axis="y", visible=False)
    panel.set_xlabel(f"predicted AlltoAll time of {answer.of_what}, ms")


def _step_curves(panel: Axes, answer: Answer) -> None:
    low, high = PUBLISHED_SHARES
    panel.axvspan(low * 100, high * 100, color="#F1F1F1", zorder=0)
    look = {"ha": "center", "va": "top", "color": "#777777", "fontsize": 10.5}
    panel.text((low + high) * 50, 0.98, "the paper's 30–60 %", transform=panel.get_xaxis_transform(), **look)
    followed = answer.found.followed
    percent, ends = answer.end_to_end["alltoall_share"] * 100, []
    for name in answer.end_to_end.columns[1:]:
        values, colour = answer.end_to_end[name], answer.color(name)
        dashes, width = ("-", 2.6) if name == followed else ("--", 1.8)
        panel.plot(percent, values, dashes, color=colour, linewidth=width)
        ends.append((float(values.iloc[-1]), answer.label(name), colour))
    panel.axhline(1, color=answer.color(BASELINE), linewidth=1.2)
    panel.set_xlim(0, percent.iloc[-1])
    end_labels(panel, ends)
    share, value = answer.share, answer.own_step(followed)
    if share is not None and value is not None:
        panel.plot([share * 100] * 2, [panel.get_ylim()[0], value], color=style.INK, linestyle=":", linewidth=1.4)
        panel.plot(share * 100, value, "o", color=style.INK, markersize=8, zorder=6)
        text = f"at {share:.0%}: {value:.2f}×{answer.mark}"
        style.note(panel, text, (share * 100, value), (-9, 7), ha="right", fontweight="bold")
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
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0}
        look = {"va": "center", "color": colour, "fontsize": 10.5, "arrowprops": line}
        panel.annotate(label, (1, end), (1.05, at), xycoords="axes fraction", textcoords="axes fraction", **look)


def systems(answer: Answer, title: str) -> Figure:
    """A bar per system, made of its stages."""
    rows, cluster = _shown(answer.systems, answer), answer.assessment.case.cluster
    figure, (panel,) = style.grid(title, 1, 1, (12, 1.9 + 0.34 * len(rows)))
    stage_ms = rows.reindex(columns=[f"{peers}_ms" for peers in cluster.exchanges]).fillna(0)
    ends = stage_ms.cumsum(axis=1)
    tones = chain([FLAT_TONE], cycle(STAGE_TONES))
    for peers, tone, (column, ms) in zip(cluster.exchanges, tones, stage_ms.items(), strict=False):
        if ms.any():
            look = {"color": tone, "edgecolor": "white", "linewidth": 0.7, "label": exchange_words(peers, cluster)}
            panel.barh(range(len(rows)), ms, 0.7, left=ends[column] - ms, **look)
    for position, (row, end) in enumerate(zip(rows.to_dict("records"), ends.iloc[:, -1], strict=True)):
        text = f"{row['speedup']:.2f}×{answer.mark}, d = {row['dimensions']}{', drops tokens' if row['lossy'] else ''}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        style.note(panel, text, (end, position), (5, 0), va="center", fontsize=10.5, bbox=box)
    _name_rows(panel, rows, answer)
    panel.set_ylim(-0.6, len(rows) - 0.4)
    panel.set_xlim(0, float(rows["step_ms"].max()) * 1.25)
    flat_ms = rows.loc[rows["system"] == BASELINE, "step_ms"].iloc[0]
    panel.axvline(flat_ms, color=style.INK, linewidth=1, linestyle=":", zorder=1)
    figure.legend(loc="outside lower center", ncols=min(len(panel.containers), 4), fontsize=11)
    return figure


def layers(answer: Answer, title: str) -> Figure:
    """Speed-up of dispatch in every layer, and what moving experts adds to it, where it pays and where not."""
    table, name = answer.layers, answer.mover
    figure, (panel,) = style.grid(title, 1, 1, (13, 4.8))
    at, moves, label = np.arange(len(table)), table["moves"].to_numpy(bool), answer.label(name)
    reached = (table["dispatch"] * table["placement"]).to_numpy(float)
    panel.bar(at, table["dispatch"] - 1, 0.7, 1, color=STAGE_TONES[1], label="dispatch, experts in their first places")
    for which, face, words in ((moves, answer.color(name), "pays"), (~moves, "none", "does not pay")):
        if answer.assessment.named(name).candidate.moves and which.any():
            look = {"facecolor": face, "edgecolor": answer.color(name), "linewidth": 1.5}
            gain = reached[which] - table["dispatch"][which]
            panel.bar(
                at[which], gain, 0.7, table["dispatch"][which], label=f"experts moved by {label}: {words}", **look
            )
    panel.axhline(1, color=style.INK, linewidth=1)
    whole = answer.own.speedup.value
    panel.axhline(whole, color=style.INK, linewidth=1, linestyle=":")
    words = f"all layers, {answer.label(answer.found.followed)}: {whole:.2f}×"
    style.note(panel, words, (-0.5, whole), (4, 6), fontsize=10.5)
    panel.set_xticks(at, [str(layer) for layer in table["layer"]])
    panel.set_xlim(-0.6, len(table) - 0.4)
    panel.set_ylim(min(1.0, *reached, *table["dispatch"]) - 0.04, max(*reached, *table["dispatch"]) * 1.12)
    panel.set_xlabel("layer")
    panel.set_ylabel("AlltoAll speed-up over flat")
    panel.grid(axis="x", visible=False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=11)
    return figure


def traffic(answer: Answer, title: str) -> Figure:
    """Left: duplication at every level. Right: bytes that cross every level."""
    figure, (left, right) = style.grid(title, 1, 2, (13, 4.6))
    levels, groups = answer.assessment.levels, [level.label for level in answer.assessment.case.cluster.levels]
    at = np.arange(len(levels))
    percent = levels[["duplication", "independent"]] * 100
    left.bar(at, percent["duplication"], 0.55, color="#88BBDD", label=f"this routing{answer.mark}")
    look = {"color": "black", "markerfacecolor": "white", "markersize": 9, "label": "all experts equally likely"}
    left.plot(at, percent["independent"], "D", **look)
    highest = percent.max(axis=1)
    for x, (value, height) in enumerate(zip(percent["duplication"], highest, strict=True)):
        style.note(left, f"{value:.0f} %", (x, height), (0, 10), ha="center")
    left.set_xticks(at, [f"{n} {name}" for n, name in zip(levels["groups"], groups, strict=True)])
    left.set_ylim(0, max(float(highest.max()) * 1.35, 10))
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
    right.set_xticks(at, [f"between {name}" for name in groups])
    right.set_ylabel(f"MB a GPU sends in one AlltoAll{answer.mark}")
    right.set_title("What crosses each level")
    right.margins(y=0.3)
    right.legend(loc="upper right", ncols=len(names))
    right.grid(axis="x", visible=False)
    return figure
