"""Real dispatchers on real links beside what the calibrated cost model predicts for the same tokens."""

import textwrap
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.frames import Results, Run
from hiermoe.analysis.statistics import Estimate, bootstrap, paired, ratio_of_medians, ratio_of_sums
from hiermoe.analysis.wording import with_interval
from hiermoe.planner.cost import ALLTOALLS_PER_STEP, least_of_waves, time_in_chunks
from hiermoe.records.index import PREDICTIONS

BASELINE = "megatron"
# What is the same for all systems of a panel.
PANEL = ["cluster", "num_ranks", "tokens_per_rank", "narrowed", "model", "topk", "routing"]
_OF_COPIES = ("copies_ms", "gradient_ms", "net_ms", "predicted_net_ms")
SOURCES = {"emulated": "an emulated cluster", "cluster": "a cluster", "local": "one machine's loopback"}


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per measured run that has a prediction: medians per iteration of the busiest rank; most ranks first."""
    rows = pd.DataFrame([_row(run, twin, results) for run, twin in _twins(results)])
    return rows if rows.empty else rows.sort_values("num_ranks", ascending=False, kind="stable", ignore_index=True)


def _twins(results: Results) -> Iterator[tuple[Run, Run]]:
    """Measured runs and their predictions, each pair once."""
    predictions = {_same(run): run for run in results.runs.get(PREDICTIONS, ()) if run.status == "ok"}
    seen = set()
    for name, runs in results.runs.items():
        for run in runs:
            measured = name != PREDICTIONS and run.source != "simulated" and run.status == "ok"
            if measured and run.run_id not in seen and _same(run) in predictions:
                seen.add(run.run_id)
                yield run, predictions[_same(run)]


def _same(run: Run) -> str:
    return run.config.model_dump_json(exclude={"measure", "ranks", "wandb"})


def _tokens(run: Run) -> str:
    """What is the same for all systems that can be compared."""
    return run.config.model_dump_json(exclude={"system", "wandb"})


def _row(run: Run, twin: Run, results: Results) -> dict[str, object]:
    config = run.config
    assert config.ranks is not None
    steps, predicted = results.rows(run, "step"), results.rows(twin, "step")
    wire_ms, predicted_ms = paired(steps, predicted.assign(wire_ms=predicted["step_ms"]), "wire_ms")
    whole = bootstrap(lambda x: np.median(x, -1), steps["step_ms"].to_numpy(float))
    error = ratio_of_medians(wire_ms, predicted_ms)
    policy = str(config.system.policy)
    return {
        "source": run.source,
        "device": config.ranks.device,
        "cluster": config.cluster.name,
        "model": config.model.name,
        "routing": run.routing,
        "topk": config.model.topk,
        "policy": policy,
        "system": run.system,
        "label": config.system.label,
        "num_ranks": run.num_ranks,
        "tokens_per_rank": config.tokens_per_rank,
        "row_bytes": config.sizes.row_bytes,
        "narrowed": config.narrowed,
        "predicted_ms": float(np.median(predicted_ms)),
        "link_ms": _least_ms(twin, results),
        "wire_ms": float(np.median(wire_ms)),
        "value": whole.value,
        "low": whole.low,
        "high": whole.high,
        "local_ms": steps["local_ms"].median(),
        "planning_ms": steps["planning_ms"].mean(),
        "migration_ms": steps["migration_ms"].mean(),
        "copies_ms": steps["copies_ms"].median(),
        "gradient_ms": steps["gradient_ms"].median(),
        "net_ms": steps["net_ms"].median(),
        "predicted_net_ms": predicted["net_ms"].median(),
        "wire_over_predicted": error.value,
        "wire_over_predicted_low": error.low,
        "wire_over_predicted_high": error.high,
        "num_wrong": int(results.rows(run, "step", counted_only=False)["num_wrong"].sum()),
        "n": len(steps),
        **_speedups(run, twin, results),
        **_stages(run, twin, results),
    }


def _least_ms(twin: Run, results: Results) -> float:
    """What the busiest shaped links alone take for the four AlltoAlls; NaN where no link has a rate.

    Of chunks that pass different links at a time, as if nothing kept them from it.
    """
    return ALLTOALLS_PER_STEP * float(_of_an_alltoall(results.rows(twin, "dispatch"), "link_ms").median())


def _of_an_alltoall(stages: pd.DataFrame, column: str, overlap: float = 1.0, wave_ms: float | None = None) -> pd.Series:
    """Times of stages put together, by iteration, as the cost model does."""
    per_iteration = stages.groupby("iteration")
    total, longest = per_iteration[column].sum(min_count=1), per_iteration[column].max()
    chunks = per_iteration["chunks"].first()
    return time_in_chunks(total, longest, chunks, overlap, least_of_waves(chunks, per_iteration.size(), wave_ms))


def _by_links(twin: Run, results: Results, alone: bool = False) -> pd.DataFrame:
    """Stages of one AlltoAll of the simulated twin, with ``least_ms``: alpha and the busiest shaped link.

    The cost model prices the busiest GPU instead, as if the GPUs of a node had a link each. Stages that cross no shaped
    link keep its price. With ``alone`` as if each chunk were sent alone, and so started up anew.
    """
    stages, cluster = results.rows(twin, "dispatch"), twin.config.cluster
    start_ms = stages["stage"].map(lambda stage: cluster.constants(cluster.exchange_of(str(stage))).alpha_ms)
    start_ms *= stages["chunks"] if alone else stages["chunks"].map(cluster.starts)
    return stages.assign(least_ms=(start_ms + stages["link_ms"]).where(stages["link_ms"] > 0, stages["predicted_ms"]))


def _speedups(run: Run, twin: Run, results: Results) -> dict[str, float]:
    """Over stock Megatron on the same tokens: predicted, on the wire, and of the whole calls."""
    found = [
        other
        for name, runs in results.runs.items()
        for other in runs
        if name != PREDICTIONS and other.system == BASELINE and other.status == "ok" and _tokens(other) == _tokens(run)
    ]
    twins = {_same(other): other for other in results.runs.get(PREDICTIONS, ()) if other.status == "ok"}
    if not found or _same(found[0]) not in twins:
        return {}
    theirs, ours = results.rows(found[0], "step"), results.rows(run, "step")
    their_twin, our_twin = results.rows(twins[_same(found[0])], "step"), results.rows(twin, "step")
    predicted = ratio_of_sums(*paired(their_twin, our_twin, "step_ms"))
    columns: dict[str, float] = {"predicted_speedup": predicted.value}
    theirs_ms, ours_ms = (
        _of_an_alltoall(
            _by_links(one, results), "least_ms", one.config.cluster.overlap or 0.0, one.config.cluster.wave_ms
        )
        for one in (twins[_same(found[0])], twin)
    )
    columns["links_speedup"] = float(theirs_ms.sum() / ours_ms.sum())
    for name, column in (("wire", "wire_ms"), ("whole", "step_ms")):
        estimate = ratio_of_medians(*paired(theirs, ours, column))
        columns |= {
            f"{name}_speedup": estimate.value,
            f"{name}_speedup_low": estimate.low,
            f"{name}_speedup_high": estimate.high,
        }
    return columns


def _stages(run: Run, twin: Run, results: Results) -> dict[str, object]:
    """Every stage of a dispatch over alpha and its busiest link: its rows sent alone, and in the dispatcher."""
    measured, by_links = results.rows(run, "dispatch"), _by_links(twin, results, alone=True)
    parts, shaped = [], []
    for stage, rows in by_links.groupby("stage", sort=True):
        own = measured[measured["stage"] == stage].groupby("iteration")[["alone_ms", "wire_ms"]].max()
        both = rows.set_index("iteration")[["least_ms", "link_ms"]].join(own, how="inner").median()
        if both.drop("link_ms").isna().any():
            continue
        alone, inside = both[["alone_ms", "wire_ms"]] / both["least_ms"]
        parts.append(f"{stage} {alone:.2f}, {inside:.2f}")
        if both["link_ms"] > 0:
            shaped.append(alone)
    return {
        "stages": "; ".join(parts),
        "alone_low": min(shaped, default=np.nan),
        "alone_high": max(shaped, default=np.nan),
    }


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A panel per cluster, model, K and routing: a row per system, predicted above measured."""
    groups = list(_panels(table))
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    heights = [0.9 + 0.46 * max(len(rows) for _, rows in groups[n * columns : (n + 1) * columns]) for n in range(lines)]
    figure, panels = style.grid(title, lines, columns, (12, 1.6 + sum(heights)), height_ratios=heights)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    for panel, (name, rows) in zip(panels, groups, strict=False):
        for position, (_, row) in enumerate(rows.iterrows()):
            tone = style.color(str(row["system"]))
            panel.barh(position - 0.2, row["predicted_ms"], 0.34, facecolor="none", edgecolor=tone, linewidth=1.4)
            panel.barh(position + 0.2, row["wire_ms"], 0.34, color=tone)
            panel.barh(position + 0.2, row["value"] - row["wire_ms"], 0.34, left=row["wire_ms"], color=tone, alpha=0.35)
            panel.plot([row["link_ms"]] * 2, [position + 0.02, position + 0.38], color="white", linewidth=2.2)
            ends = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
            panel.errorbar(row["value"], position + 0.2, xerr=ends, color=style.INK, capsize=3, elinewidth=1.4)
            if not np.isnan(row.get("whole_speedup", np.nan)) and row["system"] != BASELINE:
                panel.annotate(
                    f"{row['whole_speedup']:.2f}×", (row["high"], position + 0.2), xytext=(6, 0),
                    textcoords="offset points", va="center", fontsize=10.5,
                )  # fmt: skip
        panel.set_yticks(range(len(rows)), list(rows["label"]))
        panel.set_ylim(len(rows) - 0.45, -0.55)
        panel.set_xlim(0, max(rows["high"].max(), rows["predicted_ms"].max()) * 1.15)
        panel.grid(axis="y", visible=False)
        panel.set_title(textwrap.fill(name, 40), fontsize=12)
        panel.set_xlabel("four AlltoAlls of one layer, ms a step")
    bar = {"linestyle": "", "marker": "|", "markersize": 15, "markeredgewidth": 2.2, "color": "#BBBBBB"}
    factor = {"linestyle": "", "marker": "$1.2\\times$", "markersize": 22, "color": style.INK}
    marks: list[Patch | Line2D] = [
        Patch(facecolor="none", edgecolor="#444444", linewidth=1.4, label="predicted by the calibrated α + n·β"),
        Patch(color="#444444", label="measured, on the wire"),
        Patch(color="#444444", alpha=0.35, label="measured, the rest of the calls"),
        Line2D([], [], label="least on the busiest links", **bar),  # type: ignore[arg-type]
        Line2D([], [], label="whole calls over Megatron-LM's", **factor),  # type: ignore[arg-type]
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=11)
    return figure


def _panels(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for _, rows in table.groupby(PANEL, sort=False):
        unique = rows.drop_duplicates(["system", "policy"])
        several = unique["label"].duplicated(keep=False)
        labels = unique["label"].where(~several, unique["label"] + unique["policy"].map(_interval))
        routing = style.ROUTINGS[str(rows["routing"].iloc[0])][1].removesuffix(" routing")
        yield f"{_what(rows.iloc[0], table)}, {routing}", unique.assign(label=labels)


def _what(row: pd.Series, table: pd.DataFrame) -> str:
    """Model and K, and what more tells rows of the table apart."""
    several = table["num_ranks"].min() < table["num_ranks"].max()
    ranks = f", {row['num_ranks']} ranks" if several else ""
    return f"{style.model(str(row['model']))}, K={row['topk']}{ranks}"


def _interval(policy: str) -> str:
    found = pd.Series([policy]).str.extract(r"interval': (\d+)")[0].iloc[0]
    return "" if pd.isna(found) else f", every {found}"


def words(table: pd.DataFrame) -> Words:
    """How far measurement and model agree, and what was measured where."""
    first = table.iloc[0]
    lead = table[(table[PANEL] == first[PANEL]).all(axis=1)].drop_duplicates("system")
    reached = [
        f"{row['label']} {row['whole_speedup']:.2f}× (predicted {row['predicted_speedup']:.2f}×)"
        for _, row in lead[lead["system"].isin(["hd2_moe", "hd_moe", "hiermoe"])].iterrows()
        if "whole_speedup" in row and not np.isnan(row["whole_speedup"])
    ]
    off = (table["wire_over_predicted"] - 1).abs()
    wrong = int(table["num_wrong"].sum())
    text = [
        f"On the wire runs take {table['wire_over_predicted'].min():.2f} to {table['wire_over_predicted'].max():.2f} "
        f"times what the calibrated model predicts (median distance {off.median():.0%}).",
        f"Elements of results and gradients that differ from their known answer: {wrong}.",
        *_gap(table),
        *_alone(table),
    ]
    sizes = "; ".join(
        f"{_what(row, table)}: {row['tokens_per_rank']} tokens a rank, rows of {row['row_bytes']} bytes, "
        f"1/{row['narrowed']} of the model's"
        for _, row in table.drop_duplicates([name for name in PANEL if name != "routing"]).iterrows()
    )
    ranks = " or ".join(str(n) for n in table["num_ranks"].unique())
    fewest, most = table["n"].min(), table["n"].max()
    iterations = f"{fewest}" if fewest == most else f"{fewest}–{most}"
    kind = "GPUs over NCCL" if first["device"] == "cuda" else "gloo ranks"
    return Words(
        f"Measured on {SOURCES[str(first['source'])]}, over Megatron-LM on {first['routing']} routing: "
        f"{'; '.join(reached) or 'no baseline yet'}",
        f"{ranks} {kind}. Busiest rank in each iteration, median over {iterations} iterations, "
        f"systems that one command measured interleaved, others before or after them; 95 % block-bootstrap intervals. "
        f"{sizes}.",
        tuple(text),
        tuple(_summary(table)),
    )


def _alone(table: pd.DataFrame) -> Iterator[str]:
    """What stages take without waiting, and what waiting is."""
    if not table["alone_low"].isna().all():
        yield (
            f"The rows of a dispatch's stages sent alone, all ranks ready, take {table['alone_low'].min():.2f} to "
            f"{table['alone_high'].max():.2f} times α and what the busiest shaped link needs for them; what they "
            "take above that in the dispatcher is waiting."
        )
    if (table["device"] == "cpu").all():
        yield (
            "A gloo rank tells a peer that it is ready to receive behind the data that it sends on the same "
            "connection. So the two directions of a pair may follow one another, and an AlltoAll of only two ranks can "
            "take up to twice what its links need, alone and in the calibration too."
        )
    yield (
        "Time on the wire includes waiting: a stage ends for nobody before the last rank has begun it, and before each "
        "dispatch ranks exchange counts. Where ranks share cores, most of that is local work of other ranks, which no "
        "prediction has and which every stage of a hierarchy adds once more; it pulls speed-ups towards 1."
    )
    yield (
        "The cost model prices a stage by its busiest GPU. Where the GPUs of a node share a link, what decides is the "
        "busiest link, which carries their average: the more uneven the load, the more the model overrates the flat "
        "AlltoAll. The speed-ups by the links price stages with the same α and with what that link carries."
    )


def _gap(table: pd.DataFrame) -> Iterator[str]:
    """How many speed-ups are within 15 % of those by the busiest links, and of those by the busiest GPU."""
    if "wire_speedup" not in table:
        return
    known = table.dropna(subset=["wire_speedup"])
    known = known[known["system"] != BASELINE]
    if known.empty:
        return
    by_links, by_gpu = (
        (known["wire_speedup"] / known[f"{x}_speedup"] - 1).abs() <= 0.15 for x in ("links", "predicted")
    )
    far = dict.fromkeys(f"{row['label']} on {row['routing']} routing" for _, row in known[~by_links].iterrows())
    yield (
        f"Speed-ups on the wire are within 15 % of those by the links for {by_links.sum()} of {len(known)} runs"
        + (f" (not for {', '.join(far)})" if far else "")
        + f", and within 15 % of the predicted ones for {by_gpu.sum()}."
    )


def _summary(table: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    yield (
        "model", "routing", "system", "predicted ms", "busiest links ms", "wire ms", "whole calls ms",
        "wire over predicted",
        "stages of dispatch over α and busiest link: rows alone, in the dispatcher",
        "speed-up predicted", "by the links", "on the wire", "whole calls", "planning ms a step", "migration ms a step",
        "weights to copies ms", "gradients home ms", "net ms", "net predicted ms", "n",
    )  # fmt: skip
    for _, row in table.iterrows():
        yield (
            _what(row, table),
            style.ROUTINGS[row["routing"]][1].removesuffix(" routing"),
            row["label"] + (_interval(row["policy"]) if row["system"] == "hiermoe" else ""),
            f"{row['predicted_ms']:.0f}",
            "" if np.isnan(row["link_ms"]) else f"{row['link_ms']:.0f}",
            f"{row['wire_ms']:.0f}",
            f"{row['value']:.0f} [{row['low']:.0f}, {row['high']:.0f}]",
            _estimate(row, "wire_over_predicted"),
            row["stages"],
            f"{row.get('predicted_speedup', np.nan):.2f}",
            f"{row.get('links_speedup', np.nan):.2f}",
            _estimate(row, "wire_speedup"),
            _estimate(row, "whole_speedup"),
            f"{row['planning_ms']:.0f}",
            f"{row['migration_ms']:.0f}",
            *("" if np.isnan(row[name]) else f"{row[name]:.0f}" for name in _OF_COPIES),
            str(row["n"]),
        )


def _estimate(row: pd.Series, column: str) -> str:
    if np.isnan(row.get(column, np.nan)):
        return ""
    return with_interval(Estimate(row[column], row[f"{column}_low"], row[f"{column}_high"], row["n"]))


FIGURE = FigureSpec(
    "measured",
    "Measured: real dispatchers on real links",
    "fig11",
    table,
    draw,
    words,
    {
        "emulated": "`make reproduce` as root measures on an emulated cluster",
        "cluster": "`make reproduce ON=slurm NODES=4 GPUS_PER_NODE=8` measures on a cluster; nobody has, here",
    },
)
