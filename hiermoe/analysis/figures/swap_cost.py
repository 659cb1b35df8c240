"""Sec. V-E: what moving experts costs beside what it saves."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.end_to_end import PUBLISHED_SHARES, migration_prices, migration_share
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.tables import complete, counterpart, published
from hiermoe.analysis.figures.words import headline
from hiermoe.analysis.frames import Results

FIXED = {  # the same dispatch with experts fixed
    "hiermoe": "hd_moe",
    "hiermoe_gated": "hd_moe",
    "hd2_moe_smart": "hd2_moe",
    "smartmoe": "megatron",
    "smartmoe_f1": "megatron",
}
MARKS = {"weights": "o", "full state": "s"}


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per system that moves experts, model, routing and price."""
    _, limit = published(claims, metric="swap_share_of_step")
    rows = []
    for run in results.find("swap_cost", status="ok"):
        fixed = counterpart(run, FIXED.get(run.system, ""), "swap_cost", results)
        megatron = counterpart(run, "megatron", "swap_cost", results)
        if fixed is None or megatron is None:
            continue
        steps, reference, unmoved = (results.rows(r, "step") for r in (run, megatron, fixed))
        gain = unmoved["predicted_ms"].mean() - steps["predicted_ms"].mean()
        for price in migration_prices():
            low, high = (migration_share(steps, reference, price, share) for share in PUBLISHED_SHARES)
            rows.append(
                {
                    "source": run.source, "system": run.system, "label": run.config.system.label,
                    "model": run.config.model.name, "routing": run.routing, "state": price.state, "rate": price.rate,
                    "cost_ms_per_step": price.of(steps).mean(), "gain_ms_per_step": gain,
                    "moved_experts_per_step": steps["moved_experts"].mean(), "share_low": low, "share_high": high,
                    "published_share": limit, "n": len(steps),
                }
            )  # fmt: skip
    return complete(pd.DataFrame(rows), {"hiermoe"}, ["model", "routing"])


def draw(table: pd.DataFrame, title: str) -> Figure:
    """Top: cost and gain per step. Bottom: share of the step. A column per model, on the leading routing."""
    models = [model for model in style.MODELS if model in set(table["model"])]
    figure, panels = style.grid(title, 2, len(models), (12, 8.4), sharey="row", sharex="row")
    labels = dict(zip(table["system"], table["label"], strict=True))
    for column, model in enumerate(models):
        rows = table[table["model"] == model]
        rows = rows[rows["routing"] == headline(rows)]
        upper, lower = panels[column], panels[len(models) + column]
        for position, system in enumerate(labels):
            mine = rows[rows["system"] == system]
            for _, row in mine.iterrows():
                offset = 0.16 if row["state"] == "full state" else -0.16
                tone = style.color(system)
                mark: dict[str, Any] = {
                    "color": tone,
                    "markerfacecolor": tone if row["rate"] == "link rate" else "white",
                }
                mark |= {"markeredgewidth": 2, "markersize": 9}
                upper.plot(row["cost_ms_per_step"], position + offset, MARKS[row["state"]], **mark)
                shares = [row["share_low"] * 100, row["share_high"] * 100]
                lower.plot(
                    shares, [position + offset] * 2, color=style.color(system), linewidth=3, solid_capstyle="round"
                )
                lower.plot(sum(shares) / 2, position + offset, MARKS[row["state"]], **mark)
            if len(mine):
                upper.plot(
                    [mine["gain_ms_per_step"].iloc[0]] * 2,
                    [position - 0.38, position + 0.38],
                    color="black",
                    linewidth=3,
                )
        for panel in (upper, lower):
            panel.set_yticks(range(len(labels)), list(labels.values()))
            panel.set_ylim(len(labels) - 0.5, -0.5)
        upper.set_title(f"{style.MODELS[model]}, {style.ROUTINGS[rows['routing'].iloc[0]][1]}")
        upper.set_xscale("symlog", linthresh=0.1)
        upper.set_xlabel("ms per step and layer (logarithmic beyond 0.1)")
        lower.axvline(rows["published_share"].iloc[0] * 100, color="black", linestyle="--", linewidth=1.5)
        lower.set_xscale("symlog", linthresh=0.1)
        lower.set_xlabel("migration's share of the step, %")
        for panel in (upper, lower):
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    marks = [
        Line2D([], [], marker=MARKS[p.state], linestyle="", markersize=9, color="#444444", markeredgewidth=2,
               markerfacecolor="#444444" if p.rate == "link rate" else "white", label=p.label)
        for p in migration_prices()
    ]  # fmt: skip
    gain = Line2D(
        [],
        [],
        marker="|",
        linestyle="",
        markersize=14,
        markeredgewidth=3,
        color="black",
        label="gain over fixed experts",
    )
    limit = Line2D([], [], color="black", linestyle="--", label="published share, about 1 %")
    style.legend(figure, [], with_published=False, extra=[*marks, gain, limit])
    return figure


def words(table: pd.DataFrame) -> Words:
    """Cost against gain of HierMoE, gated or not, and the share of a step."""
    lead = headline(table)
    text = []
    for (model, routing, label), rows in table[table["system"].isin(["hiermoe", "hiermoe_gated"])].groupby(
        ["model", "routing", "label"], sort=False
    ):
        costs = {f"{r.state} at the {r.rate}": r.cost_ms_per_step for r in rows.itertuples()}
        text.append(
            f"{style.MODELS[str(model)]}, {routing} routing, {label}: {rows['moved_experts_per_step'].iloc[0]:.2f} "
            "experts move per step; that costs "
            + ", ".join(f"{cost:.2g} ms ({name})" for name, cost in costs.items())
            + f", and saves {rows['gain_ms_per_step'].iloc[0]:.2g} ms per step and layer."
        )
    main = table[(table["system"] == "hiermoe") & (table["routing"] == lead)]
    full, weights = (main[main["state"] == state] for state in ("full state", "weights"))

    def percent(rows: pd.DataFrame) -> str:
        return f"{rows['share_low'].min():.1%} to {rows['share_high'].max():.1%}"

    return Words(
        f"HierMoE's swaps on {lead} routing: full state takes {percent(full)} of a step, weights alone "
        f"{percent(weights)} (published: about 1 %)",
        "Mean per measured step of one layer. Top: modelled cost of migration, and the AlltoAll time saved against "
        "the same dispatch with experts fixed. Bottom: share of the step for AlltoAll shares from 30 to 60 % of "
        f"Megatron-LM's step (line), since the paper gives no step time. n = {table['n'].iloc[0]} measured iterations. "
        "Simulated times.",
        tuple(text),
    )


FIGURE = FigureSpec("swap_cost", "Sec. V-E: cost of a swap", "swap_cost", table, draw, words)
