"""Loss curves of real training under every system, beside a control that only reorders sums."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.frames import Results

STOCK, CONTROL = "megatron", "megatron_reordered"


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per model, system and step: loss, and its distance from stock Megatron's, relative."""
    parts = []
    for run in results.find("losses", status="ok"):
        rows = results.rows(run, "train", counted_only=False)
        first_rank = rows.loc[rows["rank"] == 0, ["source", "system", "model", "iteration", "loss", "num_ranks"]]
        parts.append(first_rank.assign(label=run.label, dtype=run.config.dtype))
    if not parts:
        return pd.DataFrame()
    table = pd.concat(parts, ignore_index=True)
    models = [model for model, rows in table.groupby("model") if {STOCK, CONTROL} <= set(rows["system"])]
    table = table[table["model"].isin(models)]
    stock = table[table["system"] == STOCK].set_index(["model", "iteration"])["loss"]
    reference = stock.reindex(pd.MultiIndex.from_frame(table[["model", "iteration"]])).to_numpy()
    return table.assign(distance=np.abs(table["loss"] - reference) / reference)


def draw(table: pd.DataFrame, title: str) -> Figure:
    """Per model: the distance from stock Megatron's loss, step by step, the control in black."""
    models = list(dict.fromkeys(table["model"]))
    figure, panels = style.grid(title, 1, len(models), (11, 4.6), sharey=True)
    for panel, model in zip(panels, models, strict=True):
        rows = table[(table["model"] == model) & (table["system"] != STOCK)]
        for system, line in rows.groupby("system", sort=False):
            control = system == CONTROL
            panel.plot(
                line["iteration"] + 1,
                line["distance"].clip(lower=1e-9),
                color="black" if control else style.color(str(system)),
                linewidth=3.2 if control else 1.6,
                label=line["label"].iloc[0],
                zorder=5 if control else 3,
            )
        panel.set_yscale("log")
        panel.set_title(style.model(model) + ", narrow")
        panel.set_xlabel("training step")
    panels[0].set_ylabel("|loss − stock loss| / stock loss")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def words(table: pd.DataFrame) -> Words:
    """Largest distances, of the control and of the others."""
    others = table[~table["system"].isin([STOCK, CONTROL])]
    control = table.loc[table["system"] == CONTROL, "distance"].max()
    worst = others["distance"].max()
    steps = int(table["iteration"].max()) + 1
    close = worst <= 3 * control
    text = []
    for model, rows in table.groupby("model", sort=False):
        name = style.model(str(model))
        stock = rows[rows["system"] == STOCK].sort_values("iteration")["loss"]
        largest = rows[~rows["system"].isin([STOCK])].groupby("label", sort=False)["distance"].max()
        parts = ", ".join(f"{label} {distance:.1e}" for label, distance in largest.items())
        text.append(
            f"{name}: loss {stock.iloc[0]:.3f} to {stock.iloc[-1]:.3f} under stock Megatron; largest distances {parts}."
        )
    text.append(
        "In fp64 every system stays within 1e-9 of stock Megatron (`make test-slow`): what is seen here is the order "
        "in which fp32 numbers are added, amplified by training."
    )
    return Words(
        f"In fp32, {steps} steps under other dispatchers and moving experts drift from stock Megatron's loss "
        f"{'as little as' if close else 'more than'} the control that only reorders its sums "
        f"({worst:.0e} at most, control {control:.0e})",
        f"Measured: stock Megatron-Core trains narrow siblings on {int(table['num_ranks'].iloc[0])} gloo ranks, "
        f"{table['dtype'].iloc[0]}, same seed and data. n = 1 run each. Black: stock Megatron with the tokens of each "
        "rank in reverse.",
        tuple(text),
    )


FIGURE = FigureSpec(
    "losses",
    "Training under every system",
    "losses",
    table,
    draw,
    words,
    {"local": "`make losses` trains them"},
)
