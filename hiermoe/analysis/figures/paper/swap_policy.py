"""Sec. V-E: HierMoE over HD-MoE by maximum function, gamma and update interval."""

from collections.abc import Sequence
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.tables import published, speedups
from hiermoe.analysis.figures.words import counted, headline, span
from hiermoe.analysis.frames import Results, Run

PANELS = {  # by sweep: what it varies, in words; its column; the condition of the published claim
    "max_function": ("maximum in Q", "max_function", "max={}"),
    "gamma": ("γ of the smooth maximum", "gamma", "gamma in 5..19"),
    "frequency": ("iterations between updates", "interval", "update every {}"),
}


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per setting and routing."""
    parts = []
    for sweep, (_, column, condition) in PANELS.items():
        rows = speedups(results, sweep, "hd_moe", partial(_updates, results))
        if rows.empty:
            continue
        setting = [f"{value:g}" if isinstance(value, float) else str(value) for value in rows[column]]
        known = [
            published(claims, where="Sec. V-E", condition=condition.format(value), baseline="hd_moe")
            for value in setting
        ]
        low, high = zip(*known, strict=True)
        parts.append(rows.assign(varied=sweep, setting=setting, published_low=low, published_high=high))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _updates(results: Results, run: Run, fixed: Run) -> dict[str, float]:
    """Updates that had moved experts when measuring began."""
    steps = results.rows(run, "step", counted_only=False)
    return {"updates_before": float((steps.loc[~steps["counted"], "moved_experts"] > 0).sum())}


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A panel per setting."""
    figure, panels = style.grid(title, 1, len(PANELS), (12, 5), sharey=True)
    routings = style.ordered(table["routing"])
    for panel, (sweep, (label, *_)) in zip(panels, PANELS.items(), strict=True):
        rows = table[table["varied"] == sweep]
        settings = list(dict.fromkeys(rows["setting"]))
        for _, row in rows.iterrows():
            offset = (routings.index(row["routing"]) - (len(routings) - 1) / 2) * 0.22
            style.ours(panel, row, settings.index(row["setting"]) + offset, row["value"], vertical=True)
        for _, row in rows.drop_duplicates("setting").iterrows():
            x = settings.index(row["setting"])
            panel.plot([x, x], [row["published_low"], row["published_high"]], color="black", linewidth=1.6)
            style.published(panel, x, (row["published_low"] + row["published_high"]) / 2)
        panel.axhline(1, color=style.color("hd_moe"), linewidth=1.5)
        panel.set_xticks(
            range(len(settings)), ["log-sum-exp" if setting == "logsumexp" else setting for setting in settings]
        )
        panel.set_xlabel(label)
        panel.set_xlim(-0.5, max(len(settings), 1) - 0.5)
        panel.grid(axis="x", visible=False)
    panels[0].set_ylabel("HierMoE over HD-MoE, AlltoAll")
    style.legend(figure, routings)
    return figure


def words(table: pd.DataFrame) -> Words:
    """What swaps gain beyond HierD-AlltoAll, by setting."""
    lead = headline(table)
    text = []
    for routing in style.ordered(table["routing"]):
        rows = table[table["routing"] == routing]
        parts = "; ".join(
            f"{PANELS[str(sweep)][0]} {span(part['value'], 3)}" for sweep, part in rows.groupby("varied", sort=False)
        )
        text.append(f"On {routing} routing: {parts}.")
    intervals = table[(table["varied"] == "frequency") & (table["routing"] == lead)]
    if len(intervals):
        done = ", ".join(f"{row.updates_before:.0f} at every {row.setting}" for row in intervals.itertuples())
        text.append(
            f"Updates that had moved experts when measuring began, {lead} routing: {done}. Each swaps one pair, so "
            "rarer updates have come less far; the paper does not say how long its runs were."
        )
    if "uniform" in set(table["routing"]):
        text.append(
            "Uniform routing has no structure that lasts from one step to the next: a swap chosen on one step's noise "
            "meets another's, so there is nothing to gain, and a ratio of 1 there is what a correct simulation must "
            "give."
        )
    ours = table[table["routing"] == lead]
    known = pd.concat([table["published_low"], table["published_high"]])
    return Words(
        f"Swaps on {lead} routing make HD-MoE's AlltoAll {span(ours['value'], 3)}× as fast (published: {span(known)}×)",
        "Ratio of AlltoAll times summed over the measured iterations, each swap acting from the next iteration on. "
        f"{counted(table)}",
        tuple(text),
    )


FIGURE = FigureSpec("swap_policy", "Sec. V-E: maximum function, γ, update interval", "max_function", table, draw, words)
