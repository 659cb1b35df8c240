"""Table IV: AlltoAll speed-up over Megatron-LM by K, E and G."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.tables import published, speedups
from hiermoe.analysis.figures.words import counted, headline, per_routing, span
from hiermoe.analysis.frames import Results

VARIED = {"K": "experts per token, K", "E": "experts, E", "G": "GPUs, G"}


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per system, column of Table IV and routing."""
    rows = speedups(results, "table4", "megatron")
    if rows.empty:
        return rows
    column = rows["experiment"].str.removeprefix("table4_").str.upper()
    rows["varied"], rows["size"] = column.str[0], column.str[1:].astype(int)
    known = [
        published(claims, where="Table IV", system=r.system, condition=f"{r.varied}={r.size}")[0]
        for r in rows.itertuples()
    ]
    return rows.assign(published=known)


def draw(table: pd.DataFrame, title: str) -> Figure:
    """Rows of panels are systems, columns are K, E and G."""
    systems = table["system"].unique().tolist()
    figure, panels = style.grid(
        title, len(systems), len(VARIED), (11, 2 + 2.2 * len(systems)), sharex="col", sharey=True
    )
    routings = style.ordered(table["routing"])
    cells = [(system, varied) for system in systems for varied in VARIED]
    for panel, (system, varied) in zip(panels, cells, strict=True):
        rows = table[(table["system"] == system) & (table["varied"] == varied)]
        sizes = sorted(table.loc[table["varied"] == varied, "size"].unique())
        for _, row in rows.iterrows():
            offset = (routings.index(row["routing"]) + 1) * 0.2 - 0.1 * len(routings)
            style.ours(panel, row, sizes.index(row["size"]) + offset, row["value"], vertical=True)
        for _, row in rows.drop_duplicates("size").iterrows():
            style.published(panel, sizes.index(row["size"]) - 0.2 - 0.1 * (len(routings) - 1), row["published"])
        panel.axhline(1, color=style.color("megatron"), linewidth=1.2)
        names = [f"{size}*" if (varied, size) == ("G", 16) else str(size) for size in sizes]
        panel.set_xticks(range(len(sizes)), names)
        panel.set_xlim(-0.6, len(sizes) - 0.4)
        panel.grid(axis="x", visible=False)
        if system == systems[-1]:
            panel.set_xlabel(VARIED[varied])
        if varied == next(iter(VARIED)):
            panel.set_ylabel(f"{rows['label'].iloc[0] if len(rows) else system}\nover Megatron-LM")
    panels[0].set_ylim(0, max(table["value"].max(), table["published"].max()) * 1.1)
    style.legend(figure, routings)
    return figure


def words(table: pd.DataFrame) -> Words:
    """How far ours are from the nine columns, and the steps that no cost model with these constants makes."""
    off = table.assign(ratio=table["value"] / table["published"]).dropna(subset="ratio")
    lead = headline(table)
    leading = off.loc[off["routing"] == lead, "ratio"]
    text = [
        f"{rows['label'].iloc[0]}: ours over published is {per_routing(rows, 'ratio')}."
        for _, rows in off.groupby("system", sort=False)
    ]
    return Words(
        f"Table IV on {lead} routing: our speed-ups are {span(leading)} times the published ones, median "
        f"{leading.median():.2f}",
        "G = 16 (starred): two constants are derived from the four-node ones (reading 3). Ratio of AlltoAll times "
        f"summed over the measured iterations. {counted(table)}",
        tuple(text),
    )


FIGURE = FigureSpec("table4", "Table IV: experts per token, experts, GPUs", "table4", table, draw, words)
