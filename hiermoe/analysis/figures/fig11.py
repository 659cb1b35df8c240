"""Fig. 11: AlltoAll speed-up over Megatron-LM, every system, both models."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.tables import counterpart, published, speedups
from hiermoe.analysis.figures.words import counted, headline, per_routing
from hiermoe.analysis.frames import Results


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per system, model and routing, with what the routing is like."""
    rows = speedups(results, "fig11", "megatron")
    if rows.empty:
        return rows
    known = [published(claims, where="Fig. 11", system=r.system, model=r.model, baseline="megatron")[0] for r in rows.itertuples()]
    rows["published"] = known
    dropped, nodes, imbalance = [], [], []
    for run in results.find("fig11", status="ok"):
        megatron = counterpart(run, "megatron", "fig11", results)
        if megatron is None or run.run_id == megatron.run_id:
            continue
        steps, routing = results.rows(megatron, "step"), results.rows(megatron, "routing")
        outermost = routing[routing["dimension"] == 1]
        lost = results.rows(run, "step")
        dropped.append(lost["dropped_pairs"].sum() / lost["pairs"].sum())
        nodes.append(outermost["rows"].sum() / (outermost["pairs"].sum() / run.value("topk")))
        imbalance.append((steps["expert_rows_max"] / steps["expert_rows_mean"]).mean())
    return rows.assign(dropped_share=dropped, nodes_per_token=nodes, expert_rows_max_over_mean=imbalance)


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A panel per model, a row per system."""
    models = [model for model in style.MODELS if model in set(table["model"])]
    figure, panels = style.grid(title, 1, len(models), (12, 7.2), sharey=True)
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
        return table[(table["system"] == system) & (table["routing"] == routing)].sort_values("model")

    reached = "; ".join(
        f"{style.MODELS[row['model']]} {row['value']:.2f}× (paper {row['published']:.2f}×)"
        for _, row in of("hiermoe").iterrows()
    )
    text = []
    for model in of("hiermoe")["model"]:
        rows = table[table["model"] == model]
        routes = rows.drop_duplicates("routing")
        text.append(
            f"{style.MODELS[model]}: HierMoE's speed-up over Megatron-LM is {per_routing(rows[rows['system'] == 'hiermoe'])}, HD-MoE's "
            f"{per_routing(rows[rows['system'] == 'hd_moe'])}. A token touches {per_routing(routes, 'nodes_per_token')} nodes on average, "
            f"and Megatron-LM's busiest GPU computes {per_routing(routes, 'expert_rows_max_over_mean')} times the mean: fewer "
            "nodes a token favour deduplication, imbalance slows every system and leaves a placement something to gain."
        )
    lossy = table[table["dropped_share"] > 0]
    if len(lossy):
        text.append(
            f"{lossy['label'].iloc[0]} drops {per_routing(lossy.assign(percent=lossy['dropped_share'] * 100), 'percent', 1)} "
            "(in percent of all pairs), so its time is not that of the same work."
        )
    return Words(
        f"HierMoE's AlltoAll over Megatron-LM's on {lead} routing: {reached}",
        f"Ratio of AlltoAll times summed over the measured iterations. The plotted Tutel-2DH is the unpadded, intra-node-first one; "
        f"its variants stand below it. {counted(table)}",
        tuple(text),
    )


FIGURE = FigureSpec("fig11", "Fig. 11: AlltoAll time of all systems", "fig11", table, draw, words)
