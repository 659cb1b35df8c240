"""Fig. 11: AlltoAll speed-up over Megatron-LM, every system, both models."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.tables import complete, published, speedups
from hiermoe.analysis.figures.words import counted, headline, per_routing
from hiermoe.analysis.frames import Results, Run


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per system, model and routing, with what the routing is like."""

    def describe(run: Run, megatron: Run) -> dict[str, float]:
        fields = {"where": "Fig. 11", "system": run.system, "model": run.config.model.name, "baseline": "megatron"}
        steps, routing, own = (results.rows(*of) for of in ((megatron, "step"), (megatron, "routing"), (run, "step")))
        outermost = routing[routing["dimension"] == 1]
        return {
            "published": published(claims, **fields)[0],
            "dropped_share": own["dropped_pairs"].sum() / own["pairs"].sum(),
            "nodes_per_token": outermost["rows"].sum() / (outermost["pairs"].sum() / run.value("topk")),
            "expert_rows_max_over_mean": (steps["expert_rows_max"] / steps["expert_rows_mean"]).mean(),
        }

    rows = speedups(results, "fig11", "megatron", describe)
    return complete(rows, {"hd_moe", "hiermoe"}, ["model", "routing"])


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A panel per model, a row per system."""
    models = [model for model in style.MODELS if model in set(table["model"])]
    figure, panels = style.grid(title, 1, len(models), (12, 7.2), sharey=True, sharex=True)
    labels = dict(zip(table["system"], table["label"], strict=True))
    for panel, model in zip(panels, models, strict=True):
        style.dot_rows(panel, table[table["model"] == model], list(labels), labels)
        panel.axvline(1, color=style.color("megatron"), linewidth=1.5)
        panel.set_title(style.MODELS[model])
        panel.set_xlabel("AlltoAll speed-up over Megatron-LM")
        panel.set_xlim(left=0)
    style.legend(figure, table["routing"])
    return figure


def words(table: pd.DataFrame) -> Words:
    """What HierMoE gains, what of it deduplication and placement bring, and why routings differ."""
    lead = headline(table)

    def of(system: str, routing: str = lead) -> pd.DataFrame:
        return table[(table["system"] == system) & (table["routing"] == routing)]

    reached = "; ".join(
        f"{style.MODELS[row['model']]} {row['value']:.2f}× (paper {row['published']:.2f}×)"
        for _, row in of("hiermoe").iterrows()
    )
    text = []
    for model, rows in table.groupby("model", sort=False):
        routes = rows.drop_duplicates("routing")
        text.append(
            f"{style.MODELS[str(model)]}: HD-MoE over Megatron-LM {per_routing(rows[rows['system'] == 'hd_moe'])}; "
            f"HierMoE {per_routing(rows[rows['system'] == 'hiermoe'])}. Nodes that a token touches: "
            f"{per_routing(routes, 'nodes_per_token')}; busiest GPU's token–expert pairs over the mean with experts in "
            f"order: {per_routing(routes, 'expert_rows_max_over_mean')}."
        )
    text.append(
        "The fewer nodes a token touches, the more deduplication saves; the more uneven the load, the longer every "
        "AlltoAll and the more a placement can gain. Uniform routing has neither, so what its speed-ups lack or "
        "exceed is due to structure."
    )
    lossy = table[table["dropped_share"] > 0]
    if len(lossy):
        text.append(
            f"{lossy['label'].iloc[0]} drops "
            f"{per_routing(lossy.assign(percent=lossy['dropped_share'] * 100), 'percent', 1)} (in percent of all "
            "pairs), so its time is not that of the same work."
        )
    return Words(
        f"HierMoE's AlltoAll over Megatron-LM's on {lead} routing: {reached}",
        "Ratio of AlltoAll times summed over the measured iterations. The plotted Tutel-2DH is the unpadded, "
        f"intra-node-first one; its variants stand below it. {counted(table)}",
        tuple(text),
    )


FIGURE = FigureSpec("fig11", "Fig. 11: AlltoAll time of all systems", "fig11", table, draw, words)
