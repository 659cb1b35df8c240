"""What swaps gain against what routing leaves to placement: a mark a routing, and where the published gains lie."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.tables import published, row_of
from hiermoe.analysis.figures.words import counted, span
from hiermoe.analysis.frames import Results, Run
from hiermoe.analysis.quantities import speedup
from hiermoe.records.index import REAL_MODELS, RECORDED, over

SWEEP = "structure"
SWEEPS = (SWEEP, over(SWEEP, RECORDED), over(SWEEP, REAL_MODELS))


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per model, routing and place: HierMoE and the searched placement over experts fixed, and the paper's."""
    by_place: dict[tuple[str, ...], dict[str, Run]] = {}
    for run in (run for name in SWEEPS for run in results.find(name, status="ok")):
        by_place.setdefault((run.config.model.name, run.routing, run.place), {})[run.system] = run
    rows, stated = [], _published(claims)
    for (_, _, place), runs in by_place.items():
        if runs.keys() >= {"hd_moe", "hiermoe", "hiermoe_search"}:
            ours, searched = (speedup(runs[name], runs["hd_moe"], results) for name in ("hiermoe", "hiermoe_search"))
            more = {"place": place, "searched": searched.value}
            more |= {"published_low": min(stated), "published_high": max(stated)}
            rows.append(row_of(runs["hiermoe"], ours, **more))
    return pd.DataFrame(rows)


def _published(claims: Sequence[Claim]) -> list[float]:
    """HierMoE over HD-MoE of each model, from both ratios over Megatron-LM in Fig. 11."""
    found = []
    for model in dict.fromkeys(claim.model for claim in claims if claim.where == "Fig. 11" and claim.model != "both"):
        ours, fixed = (
            published(claims, where="Fig. 11", system=system, model=model, baseline="megatron")[0]
            for system in ("hiermoe", "hd_moe")
        )
        found.append(ours / fixed)
    return found


def draw(table: pd.DataFrame, title: str) -> Figure:
    """One panel: what a search finds to the right, what swaps gain upwards; the paper's gains are lines."""
    figure, (panel,) = style.grid(title, 1, 1, (11, 6.4))
    for _, row in table.iterrows():
        style.ours(panel, row, row["searched"], row["value"], vertical=True)
    most = 1.02 * table[["searched", "high", "published_high"]].max().max()
    panel.plot([1, most], [1, most], color="#888888", linestyle=(0, (4, 2)), linewidth=1.3)
    style.note(panel, "all that a search finds", (most, most), (-26, 0), ha="right", va="top", color="#555555")
    for stated in table[["published_low", "published_high"]].iloc[0]:
        panel.axhline(stated, color="black", linewidth=1.2)
        panel.text(panel.get_xlim()[0], stated, f" published: {stated:.2f}", va="bottom", fontsize=11)
    panel.axhline(1, color="#333333", linewidth=1.5)
    panel.set_xlabel("searched placement over experts fixed: what this routing leaves to placement")
    panel.set_ylabel("HierMoE over HD-MoE:\nwhat swaps gain")
    handles = [
        Line2D([], [], linestyle="", marker=style.ROUTINGS[x][0], color=style.shade("hiermoe", x), markersize=9)
        for x in style.ordered(table["routing"])
    ]
    panel.legend(handles, [style.ROUTINGS[x][1] for x in style.ordered(table["routing"])], loc="upper left")
    return figure


def words(table: pd.DataFrame) -> Words:
    """Per routing: what search finds, what swaps gain, and how many places reach the published gain."""
    least = table["published_low"].iloc[0]
    gains = [
        f"{span(rows['value'])} on {style.ROUTINGS[str(routing)][1]}"
        for routing, rows in table.groupby("routing", sort=False)
    ]
    text = []
    for (routing, model), rows in table.groupby(["routing", "model"], sort=False):  # type: ignore[misc]
        reach = int((rows["value"] >= least).sum())
        name = f"{style.model(str(model))}, {style.ROUTINGS[str(routing)][1]}"
        text.append(
            f"{name}: a search makes held-out AlltoAll {span(rows['searched'])} times as fast as experts fixed, "
            f"HierMoE's swaps {span(rows['value'])} (median {rows['value'].median():.3f}); {reach} of {len(rows)} "
            "reach the smaller published gain."
        )
    stated = f"{least:.2f} and {table['published_high'].iloc[0]:.2f}"
    return Words(
        f"AlltoAll's speed-up by HierMoE's swaps: {', '.join(gains)}; published {stated}",
        "A mark a model, routing and layer; the same dispatch everywhere. To the right: a placement searched on the "
        f"first half of a run, judged on the second. Sequences of a public set's task may share prompt text, in both "
        "halves. Lines: the paper's Fig. 11, of routing that is not published. "
        f"{counted(table)}",
        tuple(text),
    )


FIGURE = FigureSpec("structure", "What routing leaves to placement, and what swaps find", SWEEP, table, draw, words)
