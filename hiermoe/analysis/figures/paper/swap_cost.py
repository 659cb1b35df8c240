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
from hiermoe.analysis.figures.tables import complete, counterpart, published, unmoved
from hiermoe.analysis.figures.words import headline, per_model, saves, span
from hiermoe.analysis.frames import Results
from hiermoe.analysis.whole_step import PUBLISHED_SHARES, migration_prices, migration_share

MARKS = {"weights": "o", "full state": "s"}


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per system that moves experts, model, routing and price."""
    _, limit = published(claims, metric="swap_share_of_step")
    rows = []
    for run in results.find("swap_cost", status="ok"):
        fixed, megatron = unmoved(run, "swap_cost", results), counterpart(run, "megatron", "swap_cost", results)
        if fixed is None or fixed.run_id == run.run_id or megatron is None:
            continue
        steps, reference, still = (results.rows(r, "step") for r in (run, megatron, fixed))
        gain = still["predicted_ms"].mean() - steps["predicted_ms"].mean()
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
    models = list(per_model(table))
    figure, panels = style.grid(title, 2, len(models), (12, 8.4), sharey="row", sharex="row")
    labels = dict(zip(table["system"], table["label"], strict=True))
    for (model, rows), upper, lower in zip(models, panels[: len(models)], panels[len(models) :], strict=True):
        for position, system in enumerate(labels):
            mine = rows[rows["system"] == system]
            for _, row in mine.iterrows():
                y, tone = position + (0.16 if row["state"] == "full state" else -0.16), style.color(system)
                look = _mark(row["state"], row["rate"], tone)
                upper.plot(row["cost_ms_per_step"], y, **look)
                shares = [row["share_low"] * 100, row["share_high"] * 100]
                lower.plot(shares, [y] * 2, color=tone, linewidth=3, solid_capstyle="round")
                lower.plot(sum(shares) / 2, y, **look)
            for gain in mine["gain_ms_per_step"].unique():
                upper.plot([gain] * 2, [position - 0.38, position + 0.38], color="black", linewidth=3)
        for panel in (upper, lower):
            panel.set_yticks(range(len(labels)), list(labels.values()))
            panel.set_ylim(len(labels) - 0.5, -0.5)
        upper.set_title(f"{model}, {style.ROUTINGS[rows['routing'].iloc[0]][1]}")
        upper.set_xscale("symlog", linthresh=0.1)
        upper.set_xlabel("ms per step and layer (logarithmic beyond 0.1)")
        lower.axvline(rows["published_share"].iloc[0] * 100, color="black", linestyle="--", linewidth=1.5)
        lower.set_xscale("symlog", linthresh=0.1)
        lower.set_xlabel("migration's share of the step, %")
        for panel in (upper, lower):
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    marks = [Line2D([], [], label=p.label, **_mark(p.state, p.rate, "#444444")) for p in migration_prices()]
    bar: dict[str, Any] = {"marker": "|", "linestyle": "", "markersize": 14, "markeredgewidth": 3, "color": "black"}
    gain = Line2D([], [], label="gain over fixed experts", **bar)
    limit = Line2D([], [], color="black", linestyle="--", label="published share, about 1 %")
    style.legend(figure, [], with_published=False, extra=[*marks, gain, limit])
    return figure


def _mark(state: str, rate: str, tone: str) -> dict[str, Any]:
    """The mark says what moves, and is filled at the link's rate."""
    face = tone if rate == "link rate" else "white"
    look = {"color": tone, "markerfacecolor": face, "markeredgewidth": 2, "markersize": 9}
    return {"marker": MARKS[state], "linestyle": "", **look}


def words(table: pd.DataFrame) -> Words:
    """Cost against gain of HierMoE, gated or not, and the share of a step."""
    text = []
    for model, leading in per_model(table):
        main = leading[leading["system"] == "hiermoe"]
        gain, moved = main["gain_ms_per_step"].iloc[0], main["moved_experts_per_step"].iloc[0]
        costs = " and ".join(
            f"{span(part['cost_ms_per_step'], 1)} ms for {state}" for state, part in main.groupby("state", sort=False)
        )
        text.append(
            f"{model}, {main['routing'].iloc[0]} routing, per step and layer: HierMoE moves "
            f"{moved:.2f} experts, which costs {costs} depending on the rate, and {saves(gain)} of AlltoAll "
            f"time{_on_uniform(table, main)}{_gated(leading)}.{_promised(main)}"
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


def _on_uniform(table: pd.DataFrame, main: pd.DataFrame) -> str:
    """What HierMoE's swaps do on uniform routing, where that is not what the sentence is about."""
    of = main.iloc[0]
    same = (table["system"] == of["system"]) & (table["model"] == of["model"]) & (table["routing"] == "uniform")
    if of["routing"] == "uniform" or not same.any():
        return ""
    return f" (on uniform routing it {saves(table.loc[same, 'gain_ms_per_step'].iloc[0])})"


def _promised(main: pd.DataFrame) -> str:
    """What Q saw in a swap, on the step that it was chosen from."""
    gain_ms = main["modelled_gain_ms_per_swap"].iloc[0]
    return "" if math.isnan(gain_ms) else f" On the step that it was chosen from, a swap saved {gain_ms:.2f} ms."


def _gated(leading: pd.DataFrame) -> str:
    """What the gated variant moves and saves."""
    gated = leading[leading["system"] == "hiermoe_gated"]
    if gated.empty:
        return ""
    first = gated.iloc[0]
    return f"; gated, it moves {first['moved_experts_per_step']:.2f} and {saves(first['gain_ms_per_step'])}"


FIGURE = FigureSpec("swap_cost", "Sec. V-E: cost of a swap", "swap_cost", table, draw, words)
