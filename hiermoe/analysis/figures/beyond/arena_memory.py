"""The arena on the paper's cluster: AlltoAlls and copies' traffic of a step against the memory of the copies."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.beyond import arena_rows
from hiermoe.analysis.figures.beyond.arena_rows import ARENA, CELL, MAKES, PLACES, WHAT, WITHOUT
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.frames import Results

COLUMNS = 3
LINEAR_BELOW_GB = 0.1  # of memory: systems without copies have none


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per system and routing, with whether it is on the front: no system has less of both time and memory."""
    found = arena_rows.rows(results, (ARENA, *PLACES))
    if found.empty:
        return found
    return found.assign(front=[_is_front(row, found) for _, row in found.iterrows()])


def _is_front(row: pd.Series, table: pd.DataFrame) -> bool:
    beside = table[(table[CELL] == row[CELL]).all(axis=1)]
    better = (beside["net_ms"] <= row["net_ms"]) & (beside["slots_gb"] <= row["slots_gb"])
    return not (better & ((beside["net_ms"] < row["net_ms"]) | (beside["slots_gb"] < row["slots_gb"]))).any()


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A panel per routing, a mark per system, those on the front joined and named in a corner."""
    cells = [rows for _, rows in table.groupby(CELL, sort=False)]
    lines = -(-len(cells) // COLUMNS)
    figure, panels = style.grid(title, lines, min(COLUMNS, len(cells)), (12, 1.6 + 3.9 * lines), sharex=True)
    marks = arena_rows.marks(table)
    for panel, rows in zip(panels, cells, strict=False):
        _panel(panel, rows, marks)
        panel.set_xlim(-0.03, max(float(table["slots_gb"].max()) * 1.6, 1.0))
    for panel in panels[len(cells) :]:
        panel.set_visible(False)
    for panel in panels[:: min(COLUMNS, len(cells))]:
        panel.set_ylabel("AlltoAlls and copies,\nms a step and layer")
    for panel in panels[max(0, len(cells) - COLUMNS) : len(cells)]:  # those with none below
        panel.set_xlabel("copies at a GPU, GB, all layers")
        panel.tick_params(labelbottom=True)
    style.legend(figure, [], with_published=False, extra=arena_rows.handles(table), columns=5)
    return figure


def _panel(panel: Axes, rows: pd.DataFrame, marks: dict[str, tuple[str, str]]) -> None:
    front = rows[rows["front"]].sort_values(["slots_gb", "net_ms"])
    panel.step(front["slots_gb"], front["net_ms"], where="post", color="#999999", linewidth=1.4, zorder=2)
    for _, row in rows.iterrows():
        tone, marker = marks[row["system"]]
        look = {"markeredgecolor": style.INK if row["front"] else tone, "markeredgewidth": 1.3}
        panel.plot(row["slots_gb"], row["net_ms"], marker, color=tone, markersize=9, zorder=4, **look)
    named = "\n".join(["on the front:", *front["label"]])
    panel.text(0.98, 0.97, named, transform=panel.transAxes, ha="right", va="top", fontsize=10, zorder=6)
    panel.set_xscale("symlog", linthresh=LINEAR_BELOW_GB, linscale=0.5)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_yscale("log", base=2)
    panel.set_ylim(rows["net_ms"].min() * 0.85, rows["net_ms"].max() * 1.8)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.minorticks_off()
    panel.set_title(f"{rows['routing_words'].iloc[0]}, {rows['tokens'].iloc[0]} tokens", fontsize=11)


def words(table: pd.DataFrame) -> Words:
    """Which systems with copies are worth their memory, by net time and by a layer's step."""
    text, fronts = [], []
    for (_, routing, _), rows in table.groupby(CELL, sort=False):
        best = rows[rows["system"].isin(WITHOUT)].nsmallest(1, "net_ms").iloc[0]
        paying = rows[(rows["slots_gb"] > 0) & (rows["net_ms"] < best["net_ms"])].sort_values(["net_ms", "slots_gb"])
        fronts.append(len(paying) > 0)
        shown = ", ".join(
            f"{row['label']} {row['net_ms']:.1f} ms for {row['slots_gb']:.2f} GB"
            for _, row in paying.head(3).iterrows()
        )
        least = rows.nsmallest(1, "layer_ms").iloc[0]
        text.append(
            f"{routing}: "
            + (f"{shown}; " if shown else "no system with copies takes less; ")
            + f"without copies {best['label']} {best['net_ms']:.1f} ms. With the busiest GPU's experts: "
            f"{least['label']} {least['layer_ms']:.1f} ms."
        )
    first = table.iloc[0]
    return Words(
        f"Copies of experts take less time than none, with what they send counted, on {sum(fronts)} of {len(fronts)} "
        f"routings on {style.fabric(str(first['cluster']))}",
        f"Net time of a step and layer, mean of {table['n'].min():.0f} iterations or more, against memory of copies at "
        "a GPU; tokens are those of a GPU. Joined and named: the front, beside which nothing has less of both. "
        f"Simulated, {style.model(str(first['model']))} where no real model is named. {WHAT}",
        tuple(text),
        (
            ("routing", "system", "AlltoAlls, ms", "net, ms", "rows, most / mean", "with experts, ms", "copies, GB"),
            *(
                (
                    str(row["routing_words"]),
                    str(row["label"]),
                    f"{row['alltoall_ms']:.2f}",
                    f"{row['net_ms']:.2f}",
                    f"{row['imbalance']:.2f}",
                    f"{row['layer_ms']:.2f}",
                    f"{row['slots_gb']:.2f}" if row["slots_gb"] else "",
                )
                for _, row in table.iterrows()
            ),
        ),
    )


FIGURE = FigureSpec(
    "arena_memory",
    "Beyond the paper: copies of experts, time against memory",
    ARENA,
    table,
    draw,
    words,
    {"simulated": MAKES},
)
