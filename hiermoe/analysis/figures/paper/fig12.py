"""Fig. 12: AlltoAll time over iterations in the first MoE layer."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.tables import complete
from hiermoe.analysis.figures.words import headline
from hiermoe.analysis.frames import Results


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per system, routing and iteration."""
    keys = ["source", "system", "model", "routing", "iteration", "routing_iteration", "counted"]
    parts = [
        results.rows(run, "step", counted_only=False)[[*keys, "dimension", "predicted_ms"]].assign(
            label=run.config.system.label
        )
        for run in results.find("fig12", status="ok")
    ]
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    return complete(table, {"megatron", "hd_moe", "hiermoe"}, ["routing"])


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A panel per routing, a line per system, the measured window shaded."""
    routings = style.ordered(table["routing"])
    figure, panels = style.grid(title, 1, len(routings), (11, 4.8), sharey=True)
    last = table["iteration"].max()
    for panel, routing in zip(panels, routings, strict=True):
        rows = table[table["routing"] == routing]
        window = rows.loc[rows["counted"], "iteration"]
        panel.axvspan(window.min() - 0.5, window.max() + 0.5, color="#EFEFEF", zorder=0)
        top = table["predicted_ms"].max()
        panel.annotate("measured", (window.mean(), top * 1.1), ha="center", va="top", color="#666666")
        previous = None
        for label, line in sorted(rows.groupby("label"), key=lambda item: -item[1]["predicted_ms"].iloc[-8:].mean()):
            tone = style.color(line["system"].iloc[0])
            panel.plot(line["iteration"], line["predicted_ms"], color=tone)
            end = line["predicted_ms"].iloc[-8:].mean()
            position = end if previous is None else min(end, previous - top * 0.075)
            panel.annotate(str(label), (last + 1.5, position), color=tone, va="center")
            previous = position
        panel.set_title(style.ROUTINGS[routing][1])
        panel.set_xlabel("iteration")
        panel.set_xlim(-1, last * 1.36)
        panel.set_xticks(range(0, last + 2, 16))
        panel.set_ylim(0, top * 1.12)
    panels[0].set_ylabel("four AlltoAlls of one layer, ms per step")
    return figure


def words(table: pd.DataFrame) -> Words:
    """Variation over the measured iterations, and how fast swaps take effect."""
    by_system = table[table["counted"]].groupby(["routing", "label", "system"], sort=False)["predicted_ms"]
    cv, n = (by_system.std() / by_system.mean()).rename("cv").reset_index(), by_system.size().iloc[0]
    lead = headline(table)

    def at(routing: str, system: str) -> float:
        return cv.loc[(cv["routing"] == routing) & (cv["system"] == system), "cv"].iloc[0]

    text = []
    for routing in style.ordered(table["routing"]):
        parts = ", ".join(f"{row.label} {row.cv:.2%}" for row in cv[cv["routing"] == routing].itertuples())
        text.append(f"Coefficient of variation on {routing} routing: {parts}.")
        hier = table[(table["routing"] == routing) & (table["system"] == "hiermoe")].sort_values("iteration")
        early, late = hier["predicted_ms"].iloc[:4].mean(), hier.loc[hier["counted"], "predicted_ms"].mean()
        text.append(
            f"HierMoE goes from {early:.1f} ms in its first four iterations to {late:.1f} ms in the measured ones."
        )
    first = table[(table["routing"] == lead) & (table["system"] == "megatron") & ~table["counted"]]
    passes = len(first) / first["routing_iteration"].nunique()
    if passes > 1:
        text.append(
            f"Before the measured window the run passes {passes:.1f} times through the first half of the recorded "
            "iterations; the second half is seen once, when it counts."
        )
    alone = at(lead, "hd_moe") <= at(lead, "hiermoe")
    text.append(
        f"HD-MoE, which never moves an expert, is {'steadier still' if alone else 'less steady'}: the steadiness comes "
        f"from {'deduplication' if alone else 'both deduplication and swaps'}."
    )
    steadier = at(lead, "hiermoe") < at(lead, "megatron")
    return Words(
        f"In {n} iterations of {lead} routing HierMoE varies {'less' if steadier else 'more'} "
        f"than Megatron-LM (coefficient of variation {at(lead, 'hiermoe'):.1%} against {at(lead, 'megatron'):.1%})",
        f"{style.model(table['model'].iloc[0])}, one MoE layer. Shaded: the n = {n} iterations "
        "that results count. The paper prints a curve without numbers. Simulated times.",
        tuple(text),
    )


FIGURE = FigureSpec("fig12", "Fig. 12: AlltoAll time over iterations", "fig12", table, draw, words)
