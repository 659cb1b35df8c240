"""What figures of the arena share: systems with and without copies of experts, by routing, cluster and tokens a GPU."""

from collections.abc import Iterable
from itertools import cycle
from typing import Literal

import pandas as pd
from matplotlib.lines import Line2D

from hiermoe.analysis.expert_time import TFLOPS, expert_ms
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.tables import complete
from hiermoe.analysis.frames import Results, Run
from hiermoe.records.index import REAL_MODELS, RECORDED, over

ARENA = "arena"
PLACES = (over(ARENA, RECORDED), over(ARENA, REAL_MODELS))
WITHOUT = ("hd_moe", "hiermoe")  # one home for every expert: what copies have to beat
CELL = ["cluster", "routing_words", "tokens"]  # where systems are compared
MAKES = "`hiermoe reproduce --sweeps arena arena_tokens arena_rack` makes it, and so does FULL=1"
WHAT = (
    "A layer's step: the four AlltoAlls, weights sent to copies and gradients sent back as if nothing hid them (net), "
    f"and the busiest GPU's experts at {TFLOPS:g} TFLOP/s, an assumption. Moves of experts to another home are not in "
    "it (moving_ms in the CSV)."
)
_MARKERS = "ovs^DP*X<>hd8p"
_ROUTINGS = {
    "uniform": "uniform",
    "resampled": "recorded sequences, resampled",
    "public": "real model",
    "stress_hot_adjacent": "eight hot neighbours",
    "stress_rotating": "hot experts that move on",
}


def rows(results: Results, sweeps: Iterable[str]) -> pd.DataFrame:
    """One row per system, cluster, routing and number of tokens; of several layers their mean.

    Where a run is still missing the whole cell is left out, and so is a layer on which fewer systems were simulated
    than on others of the cell: who wins must not depend on who was simulated first.

    Args:
        results: simulated ones.
        sweeps: whose runs.

    Columns:
        source, system, label, model, cluster, routing, routing_words, tokens: which.
        places: layers that the mean is over; n: iterations of each.
        alltoall_ms, net_ms: of a step and layer: the four AlltoAlls, and with what copies take.
        imbalance: expert rows of the busiest GPU over the mean.
        expert_ms: of the busiest GPU, at `TFLOPS`.
        layer_ms: net_ms and expert_ms.
        moving_ms: moves of experts to another home, a step, at the link's rate.
        slots_gb: memory of copies at a GPU, all layers.
    """
    runs = {run.run_id: run for sweep in sweeps for run in results.find(sweep)}
    open_cells = {_cell(run) for run in runs.values() if run.status == "missing"}
    ended = [run for run in runs.values() if run.status == "ok" and _cell(run) not in open_cells]
    found = pd.DataFrame([_row(run, results) for run in ended])
    if found.empty:
        return found
    systems = found.groupby([*CELL, "place"])["system"].transform("nunique")
    found = found[systems == systems.groupby([found[key] for key in CELL]).transform("max")]
    which = ["source", "system", "label", "model", *CELL, "routing"]
    numbers = ["alltoall_ms", "net_ms", "imbalance", "expert_ms", "layer_ms", "moving_ms"]
    grouped = found.groupby(which, sort=False)
    sizes = grouped.agg(slots_gb=("slots_gb", "max"), places=("n", "size"), n=("n", "min"))
    means = grouped[numbers].mean().join(sizes).reset_index()
    everywhere = means["places"] == means.groupby(CELL)["places"].transform("max")
    compared = {"megatron", *WITHOUT, "hiermoe_copies"}  # a claim's sweep over layers has no system with copies
    return complete(means[everywhere], compared, CELL).reset_index(drop=True)


def _cell(run: Run) -> tuple[str, str, int]:
    config = run.config
    return config.cluster.name.partition("@")[0], _routing_words(run), config.tokens_per_rank


def _row(run: Run, results: Results) -> dict[str, object]:
    steps, config = results.rows(run, "step"), run.config
    cluster, routing_words, tokens = _cell(run)
    busiest_ms = expert_ms(steps["expert_rows_max"], config.sizes.expert_parameters)
    return {
        "source": run.source,
        "system": run.system,
        "label": run.label,
        "model": config.model.name,
        "cluster": cluster,
        "routing": run.routing,
        "routing_words": routing_words,
        "tokens": tokens,
        "place": str(config.routing.source),
        "n": len(steps),
        "alltoall_ms": steps["predicted_ms"].mean(),
        "net_ms": steps["net_ms"].mean(),
        "imbalance": (steps["expert_rows_max"] / steps["expert_rows_mean"]).mean(),
        "expert_ms": busiest_ms.mean(),
        "layer_ms": (steps["net_ms"] + busiest_ms).mean(),
        "moving_ms": steps["migration_link_ms"].mean(),
        "slots_gb": steps["slots_gb"].max(),
    }


def _routing_words(run: Run) -> str:
    stage = run.config.routing.source.get("stage", "")
    return f"recorded, {stage}" if run.routing == "recorded" else _ROUTINGS.get(run.routing, run.routing)


def marks(table: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Colour and marker of every system of a table, so that those that share a colour differ."""
    systems = [str(name) for name in table["system"].unique()]
    return {name: (style.color(name), marker) for name, marker in zip(systems, cycle(_MARKERS), strict=False)}


def handles(table: pd.DataFrame, linestyle: Literal["", "-"] = "") -> list[Line2D]:
    """What the marks mean, for a legend."""
    labels = dict(zip(table["system"], table["label"], strict=True))
    return [
        Line2D([], [], color=tone, marker=marker, markersize=8, linestyle=linestyle, label=labels[name])
        for name, (tone, marker) in marks(table).items()
    ]
