"""Fabric by model: the best system's speed-up over the flat AlltoAll, and d*."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.beyond.fabrics import ROUTINGS, worlds
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.speedup_cells import Line, draw_cells
from hiermoe.analysis.figures.words import counted, span
from hiermoe.analysis.frames import Results
from hiermoe.topology.data_sheet import CAVEAT

LITTLE = 1.05  # speed-ups below this are not worth a change of dispatcher
CLOSE = 0.99  # of the best: as good, if simpler


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per fabric, model and routing: the simplest system within 1 % of the fastest, the flat one among them.

    The sweep names the simplest first.
    """
    found = pd.DataFrame(worlds(results, "heat_map"))
    if found.empty:
        return found
    cell = ["model", "routing", "fabric"]
    fixed = found[found["system"] == "hd_moe"].set_index(cell)["value"].rename("fixed")
    best = found[found["value"] >= CLOSE * found.groupby(cell)["value"].transform("max")]
    simplest_first = found.drop_duplicates("system").set_index("system")["label"]
    best = best.sort_values("system", key=lambda x: x.map(simplest_first.index.get_loc), kind="stable")
    best = best.assign(compared=", ".join(simplest_first))
    best = best.drop_duplicates(cell).sort_index()
    return best.join(fixed, on=cell).reset_index(drop=True)


def draw(table: pd.DataFrame, title: str) -> Figure:
    """Models and routings down, fabrics across."""
    present = set(zip(table["model"], table["routing"], strict=True))
    rows = [(model, routing) for model in style.models(table) for routing in ROUTINGS if (model, routing) in present]
    cells = {}
    for _, cell in table.iterrows():
        name = "flat" if cell["system"] == "megatron" else cell["label"]
        text = f"{cell['value']:.2f}×", f"{name}, d* = {cell['dimension']:.0f}"
        cells[(cell["model"], cell["routing"]), cell["fabric"]] = cell["value"], text
    return draw_cells(
        title,
        {(model, routing): f"{style.model(model)}\n{ROUTINGS[routing]}" for model, routing in rows},
        {fabric: style.fabric(str(fabric)).replace(", ", "\n") for fabric in table["fabric"].unique()},
        cells,
        (Line(-0.17, 15, "bold"), Line(0.2, 11)),
        "speed-up over the flat AlltoAll",
    )


def words(table: pd.DataFrame) -> Words:
    """Which fabrics and models gain, and which do not."""
    sizes = table.drop_duplicates("model").set_index("model")["ep_size"]
    gaining = table[table["value"] >= LITTLE]
    best = table.sort_values("value").iloc[-1]
    text = []
    for fabric, rows in table.groupby("fabric", sort=False):
        dims = sorted(rows["dimension"].unique())
        text.append(f"{style.fabric(str(fabric))}: {span(rows['value'])}×, d* {' or '.join(f'{d:.0f}' for d in dims)}.")
    idle = table[table["value"] < LITTLE]
    if len(idle):
        pairs = idle.groupby("fabric", sort=False)["model"].unique()
        stays = "; ".join(
            f"{style.fabric(str(fabric))}: {', '.join(style.model(m) for m in models)}"
            for fabric, models in pairs.items()
        )
        text.append(f"Below {LITTLE:.2f}×, so that the flat AlltoAll may as well stay: {stays}.")
    moved = table[table["system"] == "hiermoe"]
    if len(moved):
        text.append(
            f"Where HierMoE is the best, its swaps are worth {span((moved['value'] / moved['fixed'] - 1) * 100, 0)} % "
            "over the same dispatch with experts fixed."
        )
    groups = ", ".join(f"{style.model(str(model))} {size:.0f}" for model, size in sizes.items())
    return Words(
        f"Of {len(table)} pairs of a fabric and a routing, {len(gaining)} gain at least {(LITTLE - 1) * 100:.0f} % "
        f"over the flat AlltoAll, most {style.model(str(best['model']))} on "
        f"{style.fabric(str(best['fabric'])).partition(',')[0]} ({best['value']:.2f}×)",
        f"{table['world_size'].iloc[0]:.0f} GPUs, {CAVEAT}; expert parallelism: {groups} GPUs. The best of "
        f"{table['compared'].iloc[0]}, in this order of simplicity: the first "
        "within 1 % of the fastest. Recorded routing exists for two of the models; uniform routing is the yardstick: "
        "duplicates by chance alone, nothing for a placement to learn. "
        f"{counted(table)}",
        tuple(text),
    )


FIGURE = FigureSpec("heat_map", "Beyond the paper: which fabric gains with which model", "heat_map", table, draw, words)
