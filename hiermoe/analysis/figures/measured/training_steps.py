"""Whole training steps under every system, on links that are as slow as a cluster's: what AlltoAll time is worth."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.tables import published
from hiermoe.analysis.frames import Results
from hiermoe.analysis.statistics import bootstrap, ratio_of_sums
from hiermoe.analysis.whole_step import step_speedup
from hiermoe.analysis.wording import with_interval
from hiermoe.records.step_ends import step_ends

BASELINE = "megatron"
WHERE = {"emulated": "the emulated cluster", "cluster": "a cluster"}
PARTS = {"compute_ms": 0.35, "alltoall_ms": 1.0, "planning_ms": 0.6, "migration_ms": 0.6}  # and how dark they are


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per model and system: means over the counted steps, of the last rank to end; speed-ups over Megatron-LM.

    Means, as plans and moves come in some of the steps.
    """
    steps: dict[tuple[str, str], pd.DataFrame] = {}
    rows = []
    for run in results.find("end_to_end", status="ok"):
        config = run.config
        steps[config.model.name, run.system] = own = _steps(results.rows(run, "train"))
        rows.append(
            {
                "source": run.source,
                "model": config.model.name,
                "system": run.system,
                "label": run.label,
                "cluster": config.cluster.name,
                "num_ranks": run.num_ranks,
                "dtype": config.dtype,
                "device": config.ranks.device,
                "sizes": _sizes(config),
                "alltoall_share": _share(own),
                "loss": own["loss"].iloc[-1],
                "n": len(own),
                **{name: own[name].mean() for name in (*PARTS, "step_ms")},
                **_interval(own["step_ms"].to_numpy(float)),
            }
        )
    for row in rows:
        baseline = steps.get((row["model"], BASELINE))
        if baseline is not None:
            own = steps[row["model"], row["system"]]
            for name in ("step_ms", "alltoall_ms"):
                found = ratio_of_sums(baseline[name].to_numpy(float), own[name].to_numpy(float))
                row |= {f"{name}_speedup": found.value, f"{name}_words": with_interval(found)}
            row["expected"] = step_speedup(_share(baseline), 1 / row["alltoall_ms_speedup"])
            fields = {"where": "Fig. 10", "system": row["system"], "baseline": BASELINE, "metric": "e2e_speedup"}
            low, high = published(claims, **fields)
            row["published"] = "" if np.isnan(low) else f"{low:g}–{high:g}"
    return pd.DataFrame(rows)


def _sizes(config: Any) -> str:
    """What was trained, in words."""
    model = config.model
    layers = f"{model.num_layers} layers" + (f", {model.num_dense_layers} of them dense" * (model.num_dense_layers > 0))
    return (
        f"{style.model(model.name)}: {layers}, width {model.hidden_size}, vocabulary "
        f"{model.vocab_size}, {config.sequences_per_rank} x {config.seq_length} tokens a rank of the "
        f"corpus {config.corpus.name.replace('_', ' ')}" + (f", after {config.begun} steps" * (config.begun > 0))
    )


def _steps(counted: pd.DataFrame) -> pd.DataFrame:
    """What the last rank to end takes in each counted step, in parts.

    Migration is seen after the step, and within it where experts that travelled beside it land. Of compute and
    AlltoAlls the busiest rank counts; waiting in an AlltoAll for a rank that measures longer is AlltoAll's.
    """
    alltoall_ms = counted["alltoall_forward_ms"] + counted["alltoall_backward_ms"]
    busiest = counted.assign(alltoall_ms=alltoall_ms).groupby("iteration").max(numeric_only=True)
    ends = step_ends(counted)
    steps = busiest.drop(columns=ends.columns, errors="ignore").join(ends)
    landing_ms = steps["landing_ms"].fillna(0.0) if "landing_ms" in steps else 0.0
    steps["compute_ms"] = steps["train_step_ms"] - steps["alltoall_ms"] - landing_ms
    steps["migration_ms"] += landing_ms
    return steps


def _share(steps: pd.DataFrame) -> float:
    """AlltoAll's, of all steps together."""
    return float(steps["alltoall_ms"].sum() / steps["step_ms"].sum())


def _interval(values: np.ndarray) -> dict[str, float]:
    found = bootstrap(lambda x: np.mean(x, -1), values)
    return {"low": found.low, "high": found.high}


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A panel per model, a bar per system, made of the parts of a step."""
    models = list(dict.fromkeys(table["model"]))
    tallest = max(len(rows) for _, rows in table.groupby("model"))
    figure, panels = style.grid(title, 1, len(models), (12, 2.4 + 0.5 * tallest))
    for panel, model in zip(panels, models, strict=True):
        rows = table[table["model"] == model]
        for position, (_, row) in enumerate(rows.iterrows()):
            left = 0.0
            for part, dark in PARTS.items():
                tone = style.color(str(row["system"])) if part != "compute_ms" else "#999999"
                hatch = "//" if part == "migration_ms" else ""
                panel.barh(position, row[part], 0.6, left=left, color=tone, alpha=dark, hatch=hatch, edgecolor="white")
                left += row[part]
            if row["system"] != BASELINE and "step_ms_speedup" in row:
                panel.annotate(
                    f"{row['step_ms_speedup']:.2f}×", (left, position), xytext=(6, 0), textcoords="offset points",
                    va="center",
                )  # fmt: skip
        panel.set_yticks(range(len(rows)), list(rows["label"]))
        panel.set_ylim(len(rows) - 0.45, -0.55)
        panel.set_xlim(0, rows[list(PARTS)].sum(axis=1).max() * 1.15)
        panel.grid(axis="y", visible=False)
        narrow = ", narrow" * model.endswith("_narrow")
        panel.set_title(style.model(model) + narrow)
        panel.set_xlabel("training step, ms")
    marks = [
        Patch(color="#999999", alpha=0.35, label="everything else"),
        Patch(color="#444444", label="dispatch and combine"),
        Patch(color="#444444", alpha=0.6, label="planning"),
        Patch(facecolor="#444444", alpha=0.6, hatch="//", edgecolor="white", label="moving experts"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=4, fontsize=11.5)
    return figure


def words(table: pd.DataFrame) -> Words:
    """What whole steps gain, and what it takes."""
    first = table.iloc[0]
    best = []
    for model, rows in table.groupby("model", sort=False):
        known = rows[rows["system"] != BASELINE]
        if len(known) and "step_ms_speedup" in known:
            row = known.sort_values("step_ms_speedup").iloc[-1]
            name = style.model(str(model))
            best.append(f"{name} {row['step_ms_speedup']:.2f}× with {row['label']}")
    on_gpus = first["device"] == "cuda"
    ranks = "GPUs over NCCL" if on_gpus else "gloo ranks that share this machine's cores"
    order = "one after another" if on_gpus else "a step of one after a step of another"
    depends = (
        ""
        if on_gpus
        else (
            "Speed-ups of the step depend on AlltoAll's share, which here is that of few cores and slow links, not "
            "of GPUs; the paper's stand beside them for orientation only. "
        )
    )
    return Words(
        f"Whole training steps on {WHERE[str(first['source'])]}, fastest over Megatron-LM: "
        f"{'; '.join(best) or 'no baseline'}",
        f"Measured: stock Megatron-Core trains on {first['num_ranks']} {ranks}, {first['dtype']}. Last rank to end, "
        f"mean of {table['n'].min()} steps; 95 % block-bootstrap intervals; one run each, {order}. "
        f"{'. '.join(table['sizes'].unique())}.",
        (
            f"{depends}Planning and moving experts count as part of the step, with what is seen of them. Expected: "
            "what AlltoAll's share of Megatron-LM's step and the measured speed-up of AlltoAll alone would give.",
        ),
        tuple(_summary(table)),
    )


def _summary(table: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    yield (
        "model", "system", "step ms", "AlltoAll's share", "AlltoAll ms", "planning ms", "moving experts ms",
        "speed-up of the step", "expected", "of AlltoAll", "published, of the step", "n",
    )  # fmt: skip
    for _, row in table.iterrows():
        yield (
            style.model(row["model"]),
            row["label"],
            f"{row['step_ms']:.0f} [{row['low']:.0f}, {row['high']:.0f}]",
            f"{row['alltoall_share']:.0%}",
            f"{row['alltoall_ms']:.0f}",
            f"{row['planning_ms']:.0f}",
            f"{row['migration_ms']:.0f}",
            str(row.get("step_ms_words", "")),
            f"{row['expected']:.2f}" if "expected" in row else "",
            str(row.get("alltoall_ms_words", "")),
            row.get("published", ""),
            str(row["n"]),
        )


FIGURE = FigureSpec(
    "end_to_end",
    "Measured: whole training steps",
    "end_to_end",
    table,
    draw,
    words,
    {
        "emulated": "`make reproduce FULL=1` as root trains a narrow model on an emulated cluster",
        "cluster": "`make reproduce ON=slurm NODES=4 GPUS_PER_NODE=8 FULL=1` trains on GPUs; nobody has, here",
    },
)
