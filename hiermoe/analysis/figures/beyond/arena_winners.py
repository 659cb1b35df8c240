"""Who wins where: routing and cluster by tokens a GPU, the fastest system with copies or without."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.beyond import arena_rows
from hiermoe.analysis.figures.beyond.arena_rows import ARENA, CELL, MAKES, PLACES, WHAT, WITHOUT
from hiermoe.analysis.figures.beyond.arena_tokens import TOKENS
from hiermoe.analysis.figures.beyond.heat_map import CLOSE
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.speedup_cells import Line, draw_cells
from hiermoe.analysis.frames import Results


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per cluster, routing and number of tokens: who has a layer's shortest step, or the simplest within 1 %.

    Columns beside those of `arena_rows.rows`: ``without_label`` and ``without_ms``, the faster of `WITHOUT`; ``gain``,
    its time over the winner's; ``net_label``, who has the least net time; ``moving_label``, who has the shortest step
    if moves of experts to another home are counted too.
    """
    found = arena_rows.rows(results, (ARENA, *PLACES, TOKENS))
    if found.empty:
        return found
    still = found[found["system"].isin(WITHOUT)].sort_values("layer_ms", kind="stable").drop_duplicates(CELL)
    still = still.set_index(CELL)[["label", "layer_ms"]]
    still = still.rename(columns={"label": "without_label", "layer_ms": "without_ms"})
    net = _first_of_fastest(found, "net_ms").set_index(CELL)["label"].rename("net_label")
    with_moves = found.assign(all_ms=found["layer_ms"] + found["moving_ms"])
    moving = _first_of_fastest(with_moves, "all_ms").set_index(CELL)["label"].rename("moving_label")
    best = _first_of_fastest(found, "layer_ms").join(still.join([net, moving]), on=CELL)
    return best.assign(gain=best["without_ms"] / best["layer_ms"]).reset_index(drop=True)


def _first_of_fastest(table: pd.DataFrame, time: str) -> pd.DataFrame:
    """In each cell the simplest system within 1 % of the fastest; the sweeps name the simplest first."""
    near = table[table[time] * CLOSE <= table.groupby(CELL)[time].transform("min")]
    return near.drop_duplicates(CELL)


def draw(table: pd.DataFrame, title: str) -> Figure:
    """Clusters and routings down, tokens across."""
    rows = dict.fromkeys(zip(table["cluster"], table["routing_words"], strict=True))
    cells = {}
    for _, one in table.iterrows():
        text = f"{one['gain']:.2f}×", str(one["label"]), f"net alone: {one['net_label']}"
        cells[(one["cluster"], one["routing_words"]), one["tokens"]] = one["gain"], text
    return draw_cells(
        title,
        {(name, what): f"{style.fabric(str(name)).partition(',')[0]}\n{what}" for name, what in rows},
        {size: f"{size:.0f} tokens a GPU" for size in sorted(table["tokens"].unique())},
        cells,
        (Line(-0.25, 14, "bold"), Line(0.05, 11, "bold"), Line(0.3, 9)),
        "times as fast as the faster of HD-MoE and HierMoE",
    )


def words(table: pd.DataFrame) -> Words:
    """How often which system wins, and by how much."""
    wins = table.groupby("label", sort=False)["gain"].agg(["size", "max"]).sort_values("size", ascending=False)
    with_copies = table[table["slots_gb"] > 0]
    first = wins.index[0]
    text = [
        "Wins by a layer's step: " + ", ".join(f"{name} {row['size']:.0f}" for name, row in wins.iterrows()) + ".",
        f"By net time alone: {_counted(table['net_label'])}.",
        "By a layer's step with moves of experts to another home, at the link's rate: "
        f"{_counted(table['moving_label'])}.",
    ]
    if len(with_copies):
        best = with_copies.nlargest(1, "gain").iloc[0]
        text.append(
            f"Copies bring most to {best['label']} on {style.fabric(str(best['cluster']))}, {best['routing_words']}, "
            f"{best['tokens']} tokens: {best['gain']:.2f}× for {best['slots_gb']:.2f} GB."
        )
    return Words(
        f"{first} has the shortest step in {wins['size'].iloc[0]:.0f} of {len(table)} settings, one with "
        f"copies in {len(with_copies)}",
        "The system with the shortest step of a layer, or the simplest within 1 % of it, and how much faster it is "
        "than the faster of HD-MoE and HierMoE; below it who has the least net time. Of several layers their mean; – : "
        f"not simulated. {WHAT} HierMoE (copies) plans with this very rate.",
        tuple(text),
    )


def _counted(labels: pd.Series) -> str:
    return ", ".join(f"{name} {count}" for name, count in labels.value_counts().items())


FIGURE = FigureSpec(
    "arena_winners",
    "Beyond the paper: who wins where with copies of experts",
    ARENA,
    table,
    draw,
    words,
    {"simulated": MAKES},
)
