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
            "step_ms": own["predicted_ms"].mean(),
            "megatron_step_ms": steps["predicted_ms"].mean(),
            "dropped_share": own["dropped_pairs"].sum() / own["pairs"].sum(),
            "nodes_per_token": outermost["rows"].sum() / (outermost["pairs"].sum() / run.value("topk")),
            "expert_rows_max_over_mean": (steps["expert_rows_max"] / steps["expert_rows_mean"]).mean(),
        }

    rows = speedups(results, "fig11", "megatron", describe)
    return complete(rows, {"hd_moe", "hiermoe"}, ["model", "routing"])


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A panel per model, a row per system."""
    models = style.models(table)
    figure, panels = style.grid(title, 1, len(models), (12, 7.2), sharey=True, sharex=True)
    labels = dict(zip(table["system"], table["label"], strict=True))
    for panel, model in zip(panels, models, strict=True):
        style.dot_rows(panel, table[table["model"] == model], list(labels), labels)
        panel.axvline(1, color=style.color("megatron"), linewidth=1.5)
        panel.set_title(style.model(model))
        panel.set_xlabel("AlltoAll speed-up over Megatron-LM")
    panels[0].set_xlim(0, max(table["high"].max(), table["published"].max()) * 1.05)
    style.legend(figure, table["routing"])
    return figure


def words(table: pd.DataFrame) -> Words:
    """What HierMoE gains, what of it deduplication and placement bring, and why routings differ."""
    lead = headline(table)

    def of(system: str, routing: str = lead) -> pd.DataFrame:
        return table[(table["system"] == system) & (table["routing"] == routing)]

    reached = "; ".join(
        f"{style.model(row['model'])} {row['value']:.2f}× (paper {row['published']:.2f}×)"
        for _, row in of("hiermoe").iterrows()
    )
    text = [_why(style.model(str(model)), rows) for model, rows in table.groupby("model", sort=False)]
    text.append(
        "Tokens that touch fewer nodes shorten only what deduplicates. Uneven load lengthens the flat AlltoAll most, "
        "which waits for the busiest GPU, while a stage between nodes spreads a node's tokens over its GPUs; and it "
        "leaves a placement something to gain."
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


def _why(model: str, rows: pd.DataFrame) -> str:
    """What a model's routing does to both sides of the ratio."""
    routes = rows[rows["system"] == "hd_moe"]
    return (
        f"{model}: HD-MoE over Megatron-LM {per_routing(routes)}; HierMoE "
        f"{per_routing(rows[rows['system'] == 'hiermoe'])}. Megatron-LM's step takes "
        f"{per_routing(routes, 'megatron_step_ms', 1)} ms, HD-MoE's {per_routing(routes, 'step_ms', 1)} ms. Nodes that "
        f"a token touches: {per_routing(routes, 'nodes_per_token')}; busiest GPU's pairs over the mean with experts in "
        f"order: {per_routing(routes, 'expert_rows_max_over_mean')}."
    )


FIGURE = FigureSpec("fig11", "Fig. 11: AlltoAll time of all systems", "fig11", table, draw, words)
