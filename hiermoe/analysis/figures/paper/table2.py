"""Table II: duplication rate by number of groups and experts per token."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.tables import published, row_of
from hiermoe.analysis.figures.words import counted, headline
from hiermoe.analysis.frames import Results
from hiermoe.analysis.quantities import duplication_rate

SYSTEM = "megatron"  # experts stay: the rate is the routing's own


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per routing, K and level."""
    rows = []
    for run in results.find("table2", system=SYSTEM, status="ok"):
        for level in run.config.cluster.levels:
            groups, condition = level.groups, f"groups={level.groups} K={run.swept['topk']}"
            low, _ = published(claims, metric="duplication_rate", condition=condition)
            rate = duplication_rate(run, groups, results)
            rows.append(row_of(run, rate, groups=groups, level=level.label, topk=run.swept["topk"], published=low))
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A panel per number of groups."""
    levels = table.sort_values("groups")[["groups", "level"]].drop_duplicates()
    figure, panels = style.grid(title, 1, len(levels), (11, 4.6), sharey=True)
    for panel, (_, level) in zip(panels, levels.iterrows(), strict=True):
        rows = table[table["groups"] == level["groups"]]
        for routing in style.ordered(rows["routing"]):
            line = rows[rows["routing"] == routing].sort_values("topk")
            panel.plot(line["topk"], line["value"] * 100, color=style.shade("hd_moe", routing), zorder=2)
            for _, row in line.iterrows():
                percent = row.copy()
                percent[["value", "low", "high"]] *= 100
                percent["system"] = "hd_moe"
                style.ours(panel, percent, row["topk"], percent["value"], vertical=True, size=8)
        for _, row in rows.drop_duplicates("topk").iterrows():
            style.published(panel, row["topk"], row["published"] * 100, size=11)
        panel.set_title(f"{level['groups']} groups ({level['level']})")
        panel.set_xticks(sorted(rows["topk"].unique()))
        panel.set_xlabel("experts per token, K")
    panels[0].set_ylabel("duplicates, % of token–expert pairs")
    panels[0].set_ylim(bottom=0)
    style.legend(figure, table["routing"])
    return figure


def words(table: pd.DataFrame) -> Words:
    """Distance of each routing from Table II."""
    apart = (table["value"] - table["published"]).groupby(table["routing"]).agg(["min", "max"]) * 100
    lead = headline(table)
    low, high = float(apart["min"][lead]), float(apart["max"][lead])
    text = [
        f"On {routing.replace('_', '-')} routing, our rates differ from Table II by {apart.loc[routing, 'min']:+.1f} "
        f"to {apart.loc[routing, 'max']:+.1f} percentage points."
        for routing in style.ordered(table["routing"])
    ]
    if {"recorded", "uniform"} <= set(table["routing"]):
        both = table.pivot_table(index=["groups", "topk"], columns="routing", values="value")
        gap = ((both["recorded"] - both["uniform"]) * 100).rename("gap").reset_index()
        widest = gap.sort_values("gap", key=lambda x: x.abs()).iloc[-1]
        text.append(
            f"The largest gap between recorded and uniform routing is {widest['gap']:+.1f} points, at "
            f"{widest['groups']:.0f} groups and K={widest['topk']:.0f}: real tokens choose experts that "
            f"{'share groups more' if widest['gap'] > 0 else 'spread over groups more'} often than chance would have "
            "it."
        )
    return Words(
        f"Duplication on {lead} routing is {low:+.1f} to {high:+.1f} percentage points from Table II",
        f"Share of token–expert pairs that a transfer per (token, group) saves. {counted(table)}",
        tuple(text),
    )


FIGURE = FigureSpec("table2", "Table II: duplication rate", "table2", table, draw, words)
