"""What changes the answer: updates of the placement, and other assumptions."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure

from hiermoe.advice.answer_tables import Answer
from hiermoe.advice.figures import end_labels
from hiermoe.advice.recommendation import HORIZON_STEPS, STAY_BELOW_GAIN
from hiermoe.analysis.figures import style

DASHES = ("-", "--", "-.", ":")
LONGEST_STEPS = 10 * HORIZON_STEPS
FLIPPED = "#B3261E"


def placement(answer: Answer, title: str) -> Figure:
    """Left: gain against updates. Right: what is left of it once moving is paid."""
    figure, (left, right) = style.grid(title, 1, 2, (14, 5.2))
    steps = np.geomspace(1, LONGEST_STEPS, 200)
    most = int(answer.updates["updates"].max())
    gains, nets, dashes_of = [], [], defaultdict[str, Iterator[str]](lambda: cycle(DASHES))
    for name, rows in answer.updates.groupby("system", sort=False):
        colour, label = answer.color(str(name)), str(rows["label"].iloc[0])
        dashes = next(dashes_of[colour])
        percent = (rows[["value", "low", "high"]] - 1) * 100
        gain = float(percent["value"].iloc[-1])
        left.plot(rows["updates"], percent["value"], dashes, marker=".", color=colour, linewidth=1.8)
        left.plot([rows["updates"].iloc[-1], most], [gain] * 2, color=colour, linewidth=0.7)
        if answer.assessment.has_intervals:
            left.fill_between(rows["updates"], percent["low"], percent["high"], color=colour, alpha=0.1, linewidth=0)
        net = rows["step_ms"].iloc[0] - rows["step_ms"].iloc[-1] - rows["moved_ms"].iloc[-1] / steps
        right.plot(steps, net, dashes, color=colour, linewidth=1.8)
        gains.append((gain, label, colour))
        nets.append((float(net[-1]), label, colour))
    ticks = [n for n in (0, *(2**i for i in range(20))) if n <= most]
    left.set_xscale("symlog", linthresh=1)
    left.set_xticks(ticks, [str(n) for n in ticks])
    left.minorticks_off()
    left.set_xlim(0, max(most, 1))
    left.axhline(0, color=style.INK, linewidth=1)
    left.set_xlabel("updates, after which experts stay")
    left.set_ylabel(f"AlltoAll speed-up over fixed experts, %{answer.mark}")
    left.set_title("What updates bring on held-out steps")
    span = max(*(abs(value) for value, _, _ in nets), 0.01 * answer.flat_ms)
    right.set_xscale("log")
    right.set_xlim(1, LONGEST_STEPS)
    right.set_ylim(-1.3 * span, 1.3 * span)
    right.axhline(0, color=style.INK, linewidth=1)
    right.set_xlabel("training steps that the placement serves")
    right.set_ylabel(f"ms saved in a step, net{answer.mark}")
    right.set_title("What is left once moving is paid")
    end_labels(left, gains)
    end_labels(right, nets)
    return figure


def sensitivity(answer: Answer, title: str) -> Figure:
    """The speed-up of the followed system under every assumption."""
    rows = answer.sensitivity
    figure, (panel,) = style.grid(title, 1, 1, (12, 1.9 + 0.42 * len(rows)))
    worth, resolved = 1 / (1 - STAY_BELOW_GAIN), 1 + answer.found.resolution
    right = max(float(rows["value"].max()), resolved) * 1.15
    left = min(float(rows["value"].min()), 1.0) * 0.94
    for start, end, colour, words in (
        (left, worth, "#F6E3E1", "stay"),
        (worth, resolved, "#F8F1DC", "not resolved"),
        (resolved, right, "#E6F1E8", "use"),
    ):
        panel.axvspan(start, end, color=colour, zorder=0)
        look = {"xycoords": ("data", "axes fraction"), "va": "top", "color": "#777777", "fontsize": 10.5}
        style.note(panel, words, (start, 1.0), (4, -4), **look)
    base = float(rows["value"].iloc[0])
    panel.axvline(base, color=style.INK, linewidth=1, linestyle=":")
    for position, (value, flips) in enumerate(zip(rows["value"], rows["flips"], strict=True)):
        colour = FLIPPED if flips else style.INK
        panel.plot([base, value], [position, position], color=colour, linewidth=2)
        panel.plot(value, position, "o", color=colour, markersize=9)
        offset, side = (-10, "right") if value < base else (10, "left")
        text = f"{value:.2f}×{answer.mark}{': another answer' if flips else ''}"
        style.note(panel, text, (value, position), (offset, 0), va="center", ha=side, color=colour)
    panel.set_yticks(range(len(rows)), list(rows["assumption"]))
    panel.set_ylim(len(rows) - 0.5, -1.0)
    panel.set_xlim(left, right)
    panel.set_xlabel(f"AlltoAll speed-up of {answer.own.candidate.label} over the flat AlltoAll, moving included")
    panel.grid(visible=False)
    return figure
