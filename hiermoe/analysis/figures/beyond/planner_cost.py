"""What HierD-ES itself costs a rank: time on the machine that made the report, and bytes summed over ranks."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.words import span
from hiermoe.analysis.frames import Results

SHADES = ("#F5A873", "#D55E00", "#7A3300", "#3D1900")  # few GPUs to many


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per E, T and G: least time of each part over the repeats, which other processes disturb least.

    Worlds larger than E are left out: their expert-parallel groups are those of a smaller one.
    """
    rows = []
    for run in results.find("planner_cost", status="ok"):
        if run.num_ranks != run.config.world_size:
            continue
        parts = results.rows(run, "planning").groupby("stage")
        least_ms = parts["planning_ms"].min()
        rows.append(
            {
                "source": run.source,
                "system": run.system,
                "num_experts": run.config.model.num_experts,
                "tokens_per_rank": run.config.tokens_per_rank,
                "num_ranks": run.num_ranks,
                "levels": run.config.cluster.hierarchy.depth,
                "measure_ms": least_ms["measure"],
                "decide_ms": least_ms["decide"],
                "summed_bytes": parts["bytes"].max()["measure"],
                "n": len(parts.get_group("measure")),
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, title: str) -> Figure:
    """Against E: counting a rank's tokens, deciding, and the sum's size."""
    figure, panels = style.grid(title, 1, 3, (12, 5.2))
    sizes = sorted(table["num_ranks"].unique())
    tones = dict(zip(sizes, SHADES, strict=False))
    tokens = sorted(table["tokens_per_rank"].unique())
    columns = (("measure_ms", 1.0, tokens), ("decide_ms", 1.0, tokens[:1]), ("summed_bytes", 1e6, tokens[:1]))
    for panel, (column, unit, shown) in zip(panels, columns, strict=True):
        for ranks in sizes:
            for many, amount in enumerate(shown):
                line = table[(table["num_ranks"] == ranks) & (table["tokens_per_rank"] == amount)]
                line = line.sort_values("num_experts")
                dashes, tone = "--" if many else "-", tones[ranks]
                panel.plot(line["num_experts"], line[column] / unit, color=tone, marker="o", linestyle=dashes)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        ticks = sorted(table["num_experts"].unique())
        panel.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
        panel.minorticks_off()
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_xlabel("experts, E")
    for panel, name in zip(
        panels, ("count a rank's tokens, ms", "choose among all swaps, ms", "summed over ranks, MB"), strict=True
    ):
        panel.set_title(name)
    marks = [Line2D([], [], color=tones[g], marker="o", label=f"groups of {g:.0f} GPUs") for g in sizes]
    marks += [
        Line2D([], [], color="#555555", linestyle="--" if many else "-", label=f"{amount:.0f} tokens a rank")
        for many, amount in enumerate(tokens)
    ]
    style.legend(figure, [], with_published=False, extra=marks)
    return figure


def words(table: pd.DataFrame) -> Words:
    """How each part grows."""
    total = (table["measure_ms"] + table["decide_ms"]).rename("total_ms")
    wide = table.assign(total_ms=total)
    usual = wide[wide["num_experts"] == 256] if (wide["num_experts"] == 256).any() else wide
    usual = usual[usual["tokens_per_rank"] == usual["tokens_per_rank"].min()]
    few, many = table["num_experts"].min(), table["num_experts"].max()
    text = [
        f"Counting grows with tokens ({_power(table, 'tokens_per_rank', 'measure_ms')}) and, with the tables that it "
        f"counts into, with experts ({_power(table, 'num_experts', 'measure_ms')}); choosing grows with pairs of "
        f"experts ({_power(table, 'num_experts', 'decide_ms')}), and so does what ranks sum "
        f"({_power(table, 'num_experts', 'summed_bytes')}). Powers are slopes of a line through logarithms, "
        f"E from {few:.0f} to {many:.0f}.",
        "GPUs enter through the levels alone: counts are of groups, not of pairs of GPUs. In training one rank of all "
        "chooses for a layer.",
    ]
    return Words(
        f"HierD-ES on {usual['num_experts'].iloc[0]:.0f} experts takes a rank {span(usual['total_ms'], 1)} ms a layer "
        f"and step on this machine, and a sum of {span(usual['summed_bytes'] / 1e6, 1)} MB over ranks",
        f"Measured on the machine that made the runs, on one core, the least of {span(table['n'], 0)} repeats: not "
        "times of a GPU cluster. Two levels, K = 8, uniform routing. The sum itself is not timed.",
        tuple(text),
    )


def _power(table: pd.DataFrame, of: str, column: str) -> str:
    """Exponent of a quantity's growth, the others held, e.g. ``E^1.9``."""
    letters = {"tokens_per_rank": "T", "num_experts": "E"}
    others = [name for name in ("num_experts", "tokens_per_rank", "num_ranks") if name != of]
    slopes = [
        np.polyfit(np.log(rows[of]), np.log(rows[column]), 1)[0]
        for _, rows in table.groupby(others)
        if len(set(rows[of])) > 1
    ]
    return f"{letters[of]}^{np.mean(slopes):.1f}" if slopes else f"one {letters[of]} only"


FIGURE = FigureSpec(
    "planner_cost",
    "Beyond the paper: what planning costs",
    "planner_cost",
    table,
    draw,
    words,
    {"local": "`hiermoe reproduce --sweeps planner_cost` measures it on this machine"},
)
