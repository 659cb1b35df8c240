"""Sec. V-E: what moving experts costs beside what it saves."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.tables import complete, counterpart, published
from hiermoe.analysis.figures.words import headline, span
from hiermoe.analysis.frames import Results
from hiermoe.analysis.whole_step import PUBLISHED_SHARES, migration_prices, migration_share

FIXED = {  # the same dispatch with experts fixed
    "hiermoe": "hd_moe",
    "hiermoe_gated": "hd_moe",
    "hiermoe_multi": "hd_moe",
    "hd_moe_smart": "hd_moe",
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
                    "moved_experts_per_step": steps["moved_experts"].mean(),
                    "modelled_gain_ms_per_swap": steps["modelled_gain_ms"].mean(), "share_low": low, "share_high": high,
                    "published_share": limit, "n": len(steps),
                }
            )  # fmt: skip
    return complete(pd.DataFrame(rows), {"hiermoe"}, ["model", "routing"])


def draw(table: pd.DataFrame, title: str) -> Figure:
    """Top: cost and gain per step. Bottom: share of the step. A column per model, on the leading routing."""
    models = style.models(table)
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
        upper.set_title(f"{style.model(model)}, {style.ROUTINGS[rows['routing'].iloc[0]][1]}")
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
    text = []
    for model, rows in table.groupby("model", sort=False):
        main = rows[(rows["system"] == "hiermoe") & (rows["routing"] == headline(rows))]
        gain, moved = main["gain_ms_per_step"].iloc[0], main["moved_experts_per_step"].iloc[0]
        costs = " and ".join(
            f"{span(part['cost_ms_per_step'], 1)} ms for {state}" for state, part in main.groupby("state", sort=False)
        )
        text.append(
            f"{style.model(str(model))}, {main['routing'].iloc[0]} routing, per step and layer: HierMoE moves "
            f"{moved:.2f} experts, which costs {costs} depending on the rate, and {_saves(gain)} of AlltoAll "
            f"time{_beside(rows)}{_gated(rows)}.{_promised(main)}"
        )
    main = table[(table["system"] == "hiermoe") & (table["routing"] == headline(table))]
    shares = {state: part[["share_low", "share_high"]] for state, part in main.groupby("state")}

    def percent(state: str) -> str:
        return f"{shares[state]['share_low'].min():.1%} to {shares[state]['share_high'].max():.1%}"

    return Words(
        f"HierMoE's swaps on {headline(table)} routing: full state takes {percent('full state')} of a step, weights "
        f"alone {percent('weights')} (published: about 1 %)",
        "Mean per measured step of one layer. Top: modelled cost of migration, and the AlltoAll time saved against "
        "the same dispatch with experts fixed. Bottom: share of the step for AlltoAll shares from 30 to 60 % of "
        f"Megatron-LM's step (line), since the paper gives no step time. n = {span(table['n'], 0)} measured "
        "iterations. Simulated times.",
        tuple(text),
    )


def _saves(gain_ms: float) -> str:
    return f"{'saves' if gain_ms >= 0 else 'loses'} {abs(gain_ms):.2f} ms"


def _beside(rows: pd.DataFrame) -> str:
    """What HierMoE's swaps do on uniform routing, where that is not what the sentence is about."""
    uniform = rows[(rows["system"] == "hiermoe") & (rows["routing"] == "uniform")]
    if uniform.empty or headline(rows) == "uniform":
        return ""
    return f" (on uniform routing it {_saves(uniform['gain_ms_per_step'].iloc[0])})"


def _promised(main: pd.DataFrame) -> str:
    """What Q saw in a swap, on the step that it was chosen from."""
    gain_ms = main["modelled_gain_ms_per_swap"].iloc[0]
    return "" if math.isnan(gain_ms) else f" On the step that it was chosen from, a swap saved {gain_ms:.2f} ms."


def _gated(rows: pd.DataFrame) -> str:
    """What the gated variant moves and saves."""
    gated = rows[(rows["system"] == "hiermoe_gated") & (rows["routing"] == headline(rows))]
    if gated.empty:
        return ""
    first = gated.iloc[0]
    return f"; gated, it moves {first['moved_experts_per_step']:.2f} and {_saves(first['gain_ms_per_step'])}"


FIGURE = FigureSpec("swap_cost", "Sec. V-E: cost of a swap", "swap_cost", table, draw, words)
