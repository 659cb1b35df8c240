"""Fig. 10: end to end. What AlltoAll times mean for a step whose compute time nobody published."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.tables import complete, counterpart, published
from hiermoe.analysis.figures.words import capital, headline, per_model
from hiermoe.analysis.frames import Results
from hiermoe.analysis.whole_step import FULL_STATE_AT_LINK, PUBLISHED_SHARES, share_needed, step_speedup

SHARES = np.linspace(0.0, 0.7, 71)
WIDTHS = {"hd2_moe": 5.0, "hd2_moe_smart": 2.0, "hiermoe": 2.0}  # the first two may coincide


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per system, model, routing, share, with and without migration."""
    low, high = published(claims, metric="e2e_speedup", system="hiermoe", baseline="megatron")
    rows = []
    for run in results.find("fig10", status="ok"):
        megatron = counterpart(run, "megatron", "fig10", results)
        if megatron is None or not (run.system in WIDTHS or run.config.system.entrant):
            continue
        steps, reference_ms = results.rows(run, "step"), results.rows(megatron, "step")["predicted_ms"].sum()
        alltoall_ms, migration_ms = steps["predicted_ms"].sum(), FULL_STATE_AT_LINK.of(steps).sum()
        for migration, moved_ms in (("none", 0.0), (FULL_STATE_AT_LINK.label, migration_ms)):
            communication = (alltoall_ms + moved_ms) / reference_ms
            rows += [
                {
                    "source": run.source, "system": run.system, "label": run.config.system.label,
                    "model": run.config.model.name, "routing": run.routing, "migration": migration,
                    "communication": communication, "alltoall_share": share, "value": value, "n": len(steps),
                    "published_low": low, "published_high": high,
                }
                for share, value in zip(SHARES, step_speedup(SHARES, communication), strict=True)  # type: ignore[arg-type]
            ]  # fmt: skip
    return complete(pd.DataFrame(rows), {"hiermoe"}, ["model", "routing"])


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A panel per model: speed-up of the step against AlltoAll's share of it, on the leading routing."""
    models = list(per_model(table))
    figure, panels = style.grid(title, 1, len(models), (11.5, 5.6), sharey=True)
    for panel, (model, rows) in zip(panels, models, strict=True):
        low, high = rows[["published_low", "published_high"]].iloc[0]
        panel.axvspan(PUBLISHED_SHARES[0] * 100, PUBLISHED_SHARES[1] * 100, color="#F3F3F3", zorder=0)
        panel.axhspan(low, high, facecolor="none", edgecolor="black", linewidth=1.2, hatch="//", alpha=0.35, zorder=1)
        style.note(panel, "published, HierMoE", (1, high), (0, 3), va="bottom")
        for (system, migration), line in rows.groupby(["system", "migration"], sort=False):
            dashed = migration != "none"
            if dashed and (line["communication"].iloc[0] == rows.loc[rows["system"] == system, "communication"].min()):
                continue  # nothing moved: the same line
            look = {"color": style.color(str(system)), "linewidth": WIDTHS.get(str(system), 2.0)}
            panel.plot(line["alltoall_share"] * 100, line["value"], "--" if dashed else "-", **look)
        panel.axhline(1, color=style.color("megatron"), linewidth=1.2)
        panel.set_title(f"{model}, {style.ROUTINGS[rows['routing'].iloc[0]][1]}")
        panel.set_xlabel("AlltoAll's share of Megatron-LM's step, %")
        panel.set_xlim(0, SHARES[-1] * 100)
    panels[0].set_ylabel("speed-up of the step over Megatron-LM")
    labels = table.drop_duplicates("system").set_index("system")["label"]
    lines = [
        Line2D([], [], color=style.color(str(name)), label=label, linewidth=WIDTHS.get(str(name), 2.0))
        for name, label in labels.items()
    ]
    dashes = Line2D([], [], color="#555555", linestyle="--", label="with migration of full state")
    style.legend(figure, [], with_published=False, extra=[*lines, dashes])
    return figure


def words(table: pd.DataFrame) -> Words:
    """At which share the published speed-ups would be ours, and what 30 to 60 % would give."""
    lead = headline(table)
    text = []
    reached = {}
    for routing in dict.fromkeys([lead, "uniform"]):
        rows = table[(table["routing"] == routing) & (table["system"] == "hiermoe")].drop_duplicates(
            ["model", "migration"]
        )
        for model in rows["model"].unique():
            plain, moving = (rows.loc[rows["model"] == model, "communication"].iloc[i] for i in (0, 1))
            without = [float(step_speedup(share, plain)) for share in PUBLISHED_SHARES]
            with_moves = [float(step_speedup(share, moving)) for share in PUBLISHED_SHARES]
            ends = rows[["published_low", "published_high"]].iloc[0]
            needed = [share_needed(end, 1 / plain) for end in ends]
            reached.setdefault(routing, []).extend(without)
            text.append(
                f"{style.model(model)}, {routing} routing: AlltoAll shares of 30 to 60 % make a step {without[0]:.2f} "
                f"to {without[1]:.2f} times faster without migration, {with_moves[0]:.2f} to {with_moves[1]:.2f} times "
                f"with full state moved at the link's rate; the published {ends.iloc[0]:g}–{ends.iloc[1]:g} would need "
                f"a share of {needed[0]:.0%} to {needed[1]:.0%}."
            )
    low, high = table[["published_low", "published_high"]].iloc[0]
    return Words(
        capital(f"{lead} routing's AlltoAll times would make HierMoE's step "
        f"{min(reached[lead]):.2f}–{max(reached[lead]):.2f}× faster at AlltoAll shares of 30–60 % (published: "
        f"{low:g}–{high:g}×)"),
        "A consistency check, not a measurement: simulation has no compute time. Grey: the shares that the paper "
        "states. Hatched: the published range of HierMoE. Solid: AlltoAll alone; dashed: with migration. n = "
        f"{table['n'].iloc[0]} measured iterations.",
        tuple(text),
    )  # fmt: skip


FIGURE = FigureSpec("fig10", "Fig. 10: end to end", "fig10", table, draw, words)
