"""Compute balance: how much more than the mean the busiest GPU's experts have to do."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.tables import complete, row_of
from hiermoe.analysis.figures.words import counted, headline, per_routing
from hiermoe.analysis.frames import Results
from hiermoe.analysis.statistics import ratio_of_sums

SYSTEMS = ("megatron", "hd_moe", "hiermoe", "hiermoe_gated", "hd2_moe_smart", "smartmoe", "smartmoe_f1")


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per system, model and routing."""
    rows = []
    for run in results.find("fig11", status="ok"):
        if run.system in SYSTEMS or run.config.system.entrant:
            steps = results.rows(run, "step")
            balance = ratio_of_sums(steps["expert_rows_max"].to_numpy(float), steps["expert_rows_mean"].to_numpy(float))
            rows.append(row_of(run, balance, published=float("nan")))
    return complete(pd.DataFrame(rows), {"megatron", "hiermoe", "smartmoe"}, ["model", "routing"])


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A panel per model, a row per system."""
    models = style.models(table)
    figure, panels = style.grid(title, 1, len(models), (12, 5), sharey=True)
    named: dict[str, str] = dict(zip(table["system"], table["label"], strict=True))
    labels = {system: named[system] for system in dict.fromkeys([*SYSTEMS, *named]) if system in named}
    for panel, model in zip(panels, models, strict=True):
        style.dot_rows(panel, table[table["model"] == model], list(labels), labels)
        panel.axvline(1, color="#333333", linewidth=1.5)
        panel.set_title(style.model(model))
        panel.set_xlabel("busiest GPU's token–expert pairs over the mean")
    style.legend(figure, table["routing"], with_published=False)
    return figure


def words(table: pd.DataFrame) -> Words:
    """What each placement does to the balance of computing."""
    lead = headline(table)
    text = [
        f"{style.model(str(model))}: "
        + "; ".join(
            f"{table.loc[table['system'] == system, 'label'].iloc[0]} {per_routing(rows[rows['system'] == system])}"
            for system in ("megatron", "hiermoe", "smartmoe")
            if (rows["system"] == system).any()
        )
        + "."
        for model, rows in table.groupby("model", sort=False)
    ]
    main = table[table["routing"] == lead].groupby("system")["value"].mean()
    return Words(
        f"Busiest GPU's expert work over the mean, {lead} routing: Megatron-LM {main['megatron']:.2f}, HierMoE "
        f"{main['hiermoe']:.2f}, SmartMoE {main['smartmoe']:.2f}",
        "Title: mean of both models. Compute time follows the busiest GPU; the AlltoAll speed-ups leave it out. "
        f"HD-MoE keeps experts where they are, so it has Megatron-LM's balance. {counted(table)}",
        (*text, "HierD-ES swaps for communication, SmartMoE for token counts: a gain of one may cost the other."),
    )


FIGURE = FigureSpec("balance", "Compute balance", "fig11", table, draw, words)
