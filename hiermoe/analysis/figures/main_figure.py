"""The figure that a report begins with: published speed-ups of the main systems beside ours, predicted and measured."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hiermoe.analysis.figures import style
from hiermoe.analysis.verdicts import Judged

SYSTEMS = ("hiermoe", "hd_moe", "hd2_moe", "tutel_2dh")
PREDICTED = "simulated"
MEASURED = ("cluster", "emulated")  # the first that there is
MEASURED_MARK = "*"


def table(judged: Sequence[Judged], labels: dict[str, str]) -> pd.DataFrame:
    """One row per number of ours: AlltoAll speed-up over Megatron-LM, by model, system, routing and source.

    Args:
        judged: all claims.
        labels: of the systems.
    """
    rows = [
        {
            "source": one.case.source,
            "system": one.claim.system,
            "label": labels.get(one.claim.system, one.claim.system),
            "model": one.case.model,
            "routing": one.routing,
            "value": one.estimate.value,
            "low": one.estimate.low,
            "high": one.estimate.high,
            "n": one.estimate.n,
            "published": one.claim.low,
        }
        for one in judged
        if one.case and one.claim.where == "Fig. 11" and one.claim.metric == "a2a_speedup"
        if one.case.baseline == "megatron" and one.claim.system in SYSTEMS and one.estimate.n
    ]
    found = pd.DataFrame(rows)
    if found.empty:
        return found
    measured = next((source for source in MEASURED if source in set(found["source"])), "")
    kept = found[found["routing"].isin(["recorded", "uniform"]) & found["source"].isin([PREDICTED, measured])]
    return kept.sort_values("system", key=lambda names: names.map(SYSTEMS.index), kind="stable", ignore_index=True)


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A panel per model, a row per system: published, predicted on each routing, measured."""
    models = style.models(table)
    figure, panels = style.grid(title, 1, len(models), (12, 4.4), sharey=True, sharex=True)
    labels = dict(zip(table["system"], table["label"], strict=True))
    for panel, model in zip(panels, models, strict=True):
        rows = table[table["model"] == model]
        style.dot_rows(panel, rows[rows["source"] == PREDICTED], list(labels), labels)
        for _, row in rows[(rows["source"] != PREDICTED) & (rows["routing"] == "recorded")].iterrows():
            position = list(labels).index(row["system"])
            panel.plot(row["value"], position + 0.3, MEASURED_MARK, markersize=15, color=style.INK, zorder=6)
        panel.axvline(1, color=style.color("megatron"), linewidth=1.5)
        panel.set_title(style.model(model))
        panel.set_xlabel("AlltoAll speed-up over Megatron-LM")
    panels[0].set_xlim(0, max(table["high"].max(), table["published"].max()) * 1.05)
    star = Line2D([], [], marker=MEASURED_MARK, linestyle="", markersize=14, color=style.INK)
    star.set_label("measured, recorded routing")
    has_measured = (table["source"] != PREDICTED).any()
    style.legend(figure, table["routing"], extra=[star] if has_measured else ())
    return figure
