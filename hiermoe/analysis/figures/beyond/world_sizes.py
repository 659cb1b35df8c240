"""Every system from 8 to 4096 GPUs: time of a step's AlltoAlls, and speed-up over the flat one."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.beyond.fabrics import ROUTINGS, worlds
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.tables import complete
from hiermoe.analysis.figures.words import counted, span
from hiermoe.analysis.frames import Results
from hiermoe.topology.data_sheet import CAVEAT

MARKERS = "ovs^DoPX<>*"  # in the order of the sweep's systems
LARGE = "hiermoe reproduce --sweeps large/scaling"


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per fabric, world size and system."""
    found = pd.DataFrame(worlds(results, "scaling"))
    return complete(found, {"megatron", "hd_moe", "hiermoe"}, ["fabric", "world_size"])


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A column per fabric: time above, speed-up below, d* of HD-MoE along its line."""
    fabrics = [str(fabric) for fabric in table["fabric"].unique()]
    markers = dict(zip(map(str, table["system"].unique()), cycle(MARKERS)))
    figure, panels = style.grid(title, 2, len(fabrics), (12, 8.6), sharex=True, sharey="row")
    for column, fabric in enumerate(fabrics):
        rows = table[table["fabric"] == fabric].sort_values("world_size")
        upper, lower = panels[column], panels[len(fabrics) + column]
        _lines(upper, rows, "step_ms", markers)
        _lines(lower, rows, "value", markers)
        _mark_dimensions(lower, rows)
        for panel in (upper, lower):
            _mark_groups(panel, rows)
            panel.set_xscale("log", base=2)
        upper.set_yscale("log")
        upper.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        upper.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else "")
        sizes = sorted(table["world_size"].unique())
        lower.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
        lower.minorticks_off()
        lower.set_xlabel("GPUs")
        upper.set_title(style.fabric(fabric))
    panels[0].set_ylabel("four AlltoAlls of one layer,\nms per step (logarithmic)")
    panels[len(fabrics)].set_ylabel("speed-up over the flat AlltoAll")
    panels[len(fabrics)].set_ylim(bottom=0)
    labels = dict(zip(table["system"], table["label"], strict=True))
    labels["megatron"] += " (flat)"
    marks = [
        Line2D([], [], color=style.color(system), marker=marker, markersize=7, label=labels[system])
        for system, marker in markers.items()
    ]
    style.legend(figure, [], with_published=False, extra=marks)
    return figure


def _lines(panel: Axes, rows: pd.DataFrame, column: str, markers: Mapping[str, str]) -> None:
    for system, marker in markers.items():
        line = rows[rows["system"] == system]
        width, order = (2.4, 4) if system == "hiermoe" else (1.7, 3)
        look = {"color": style.color(system), "marker": marker, "markersize": 7}
        panel.plot(line["world_size"], line[column], linewidth=width, zorder=order, **look)


def _mark_dimensions(panel: Axes, rows: pd.DataFrame) -> None:
    """d* of HD-MoE at every size, in one line along the bottom."""
    for _, row in rows[rows["system"] == "hd_moe"].iterrows():
        look = {"ha": "center", "color": style.color("hd_moe"), "fontweight": "bold"}
        style.note(panel, f"{row['dimension']:.0f}", (row["world_size"], 0), (0, 8), **look)
    look = {"xycoords": "axes fraction", "color": style.color("hd_moe"), "fontsize": 11}
    style.note(panel, "d* of HD-MoE:", (0.012, 0), (0, 24), **look)


def _mark_groups(panel: Axes, rows: pd.DataFrame) -> None:
    """Where several expert-parallel groups stand side by side."""
    if (rows["ep_groups"] > 1).any():
        largest = rows["ep_size"].max()
        panel.axvspan(largest * 1.41, rows["world_size"].max() * 1.41, color="#F2F2F2", zorder=0)
        x, above_dimensions = largest * 1.55, 0.12  # and below all curves
        across = panel.get_xaxis_transform()
        panel.text(x, above_dimensions, f"groups of {largest:.0f}", transform=across, fontsize=11)


def words(table: pd.DataFrame) -> Words:
    """Where hierarchy begins to pay on each fabric, how much at most, and what several groups change."""
    text = [_of_fabric(style.fabric(str(fabric)), rows) for fabric, rows in table.groupby("fabric", sort=False)]
    text.append(_on_alpha(table))
    largest = table["world_size"].max()
    if (table["ep_groups"] > 1).any():
        text.append(_with_groups(table))
    else:
        text.append(f"Beyond {largest:.0f} GPUs: `{LARGE}` (minutes; the figure then has them).")
    first, caveat = table.iloc[0], CAVEAT if table["from_data_sheets"].any() else "calibrated constants"
    ends = [
        f"{rows['value'].max():.2f}× on {style.fabric(str(fabric)).partition(',')[0]}"
        for fabric, rows in table[table["system"] == "hiermoe"].groupby("fabric", sort=False)
    ]
    return Words(
        f"From {table['world_size'].min():.0f} to {largest:.0f} GPUs HierMoE's AlltoAlls reach up to "
        f"{' and '.join(ends)} over the flat one",
        f"{style.model(str(first['model']))}, {ROUTINGS[str(first['routing'])]}, {caveat}. Expert parallelism "
        "over all GPUs, but in groups of at most 256 on consecutive GPUs; such groups fill whole nodes, so they share "
        "no port, and the step waits for the slowest. Fixed two-dimensional systems split at the outermost level. "
        f"{counted(table)}",
        tuple(text),
    )


def _of_fabric(name: str, rows: pd.DataFrame) -> str:
    """One fabric, in two sentences."""
    dedup = rows[rows["system"] == "hd_moe"].sort_values("world_size")
    swaps = rows[rows["system"] == "hiermoe"].set_index("world_size")["value"]
    best = dedup.sort_values("value").iloc[-1]
    paying = dedup[dedup["value"] >= 1.1]["world_size"]
    begins = f"first exceeds 1.1× at {paying.min():.0f} GPUs" if len(paying) else "nowhere reaches 1.1×"
    added = swaps / dedup.set_index("world_size")["value"]
    split = dedup[dedup["dimension"] > 1]
    where = (
        f"d* is above 1 from {split['world_size'].min():.0f} GPUs on (split at: {split['stages'].iloc[-1]})"
        if len(split)
        else "d* is 1 throughout: the flat exchange, deduplicated"
    )
    fixed = [
        f"{of['label'].iloc[0]} {span(of['value'])}×"
        for system in ("tutel_2dh", "hd2_moe")
        if len(of := rows[rows["system"] == system])
    ]
    return (
        f"{name}: deduplication (HD-MoE) {begins} and is worth most at {best['world_size']:.0f} GPUs, "
        f"{best['value']:.2f}×; {where}. Swaps change that by {span((added - 1) * 100, 0)} %. "
        f"Fixed at two dimensions: {', '.join(fixed)}."
    )


def _on_alpha(table: pd.DataFrame) -> str:
    """How much of the times hangs on the assumption behind alpha."""
    size = table["ep_size"].max()
    largest = table[table["ep_size"] == size]
    flat, dedup = (largest.loc[largest["system"] == x, "alpha_share"] * 100 for x in ("megatron", "hd_moe"))
    return (
        "Start-up (α), which rests on an assumption where β rests on a data sheet, makes "
        f"{span(flat, 0)} % of the flat AlltoAll's time in groups of {size:.0f}, and {span(dedup, 0)} % of HD-MoE's: a "
        "flat exchange among many GPUs posts many small messages."
    )


def _with_groups(table: pd.DataFrame) -> str:
    """What more groups change: the slowest of them, and how many tokens the placement learns from."""
    parts = []
    for fabric, rows in table[table["ep_size"] == table["ep_size"].max()].groupby("fabric", sort=False):
        ms = rows.pivot_table(index="world_size", columns="system", values="step_ms")
        one, most = ms.loc[ms.index.min()], ms.loc[ms.index.max()]
        parts.append(
            f"{style.fabric(str(fabric))}: the flat AlltoAll takes "
            f"{(most['megatron'] / one['megatron'] - 1) * 100:+.0f} %, "
            f"HierMoE {(most['hiermoe'] / one['hiermoe'] - 1) * 100:+.0f} %"
        )
    top = table["world_size"].max()
    return (
        f"From one group to {top / table['ep_size'].max():.0f} of them at {top:.0f} GPUs, in which the step waits for "
        f"the slowest and all share a placement: {'; '.join(parts)}."
    )


FIGURE = FigureSpec("scaling", "Beyond the paper: from 8 to 4096 GPUs", "scaling", table, draw, words)
