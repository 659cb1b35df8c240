"""What a single run came to, for the eye."""

import pandas as pd
from rich import box
from rich.table import Table

from hiermoe.records.schema import CALLS, COPIES
from hiermoe.records.step_ends import step_ends


def summary(records: pd.DataFrame, title: str) -> Table:
    """A table of one run's record, whichever kind of numbers it has."""
    if (planning := records[records["phase"] == "planning"])["counted"].any() and len(planning) == len(records):
        return _planned(planning, title)
    return _predicted(records, title) if records["source"].iloc[0] == "simulated" else _measured(records, title)


def train_summary(records: pd.DataFrame, title: str) -> Table:
    """A table of a training run's record. Times are as in `_measured`."""
    losses = records[records["rank"] == 0].set_index("iteration")["loss"]
    counted = records[records["counted"]]
    busiest = counted.groupby("iteration")[["train_step_ms", "alltoall_forward_ms", "alltoall_backward_ms", "wire_ms"]]
    median = busiest.max().median()
    alltoall = counted["alltoall_forward_ms"] + counted["alltoall_backward_ms"]
    table = _table(title)
    table.add_row("loss", f"{losses.iloc[0]:.6f} → {losses.iloc[-1]:.6f} in {len(losses)} steps")
    table.add_row("step", f"{median['train_step_ms']:.1f} ms")
    table.add_row("dispatch and combine, forward", f"{median['alltoall_forward_ms']:.1f} ms")
    table.add_row("dispatch and combine, backward", f"{median['alltoall_backward_ms']:.1f} ms")
    table.add_row("of them on the wire", f"{median['wire_ms']:.1f} ms")
    table.add_row("their share of the step, mean", f"{(alltoall / counted['train_step_ms']).mean():.1%}")
    if records["moved_experts"].any():
        added = step_ends(counted).mean()
        moved = records.loc[records["rank"] == 0, "moved_experts"].sum()
        table.add_row("planning adds, mean", f"{added['planning_ms']:.1f} ms")
        table.add_row("moving experts adds, mean", f"{added['migration_ms']:.1f} ms, {moved:.0f} moved in all")
    table.caption = (
        f"Busiest of {records['num_ranks'].iloc[0]} ranks, median of {counted['iteration'].nunique()} steps, "
        "waiting for other ranks included."
    )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=bool(columns), box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column(columns[0] if columns else "", style="cyan", no_wrap=True)
    for column in columns[1:] or ("",):
        table.add_column(column, justify="right")
    return table


def _measured(records: pd.DataFrame, title: str) -> Table:
    """Times are those of the busiest rank in an iteration, then the median over the iterations that count."""
    counted = records[records["counted"]]
    table = _table(title, "", "dispatch_ms", "wire_ms", "local_ms", "MB", "meta", "num_wrong")

    def add(name: str, rows: pd.DataFrame) -> None:
        busiest = rows.groupby("iteration")[["dispatch_ms", "wire_ms", "local_ms", "bytes"]].max().median()
        times = ["" if pd.isna(ms) else f"{ms:.2f}" for ms in busiest[["dispatch_ms", "wire_ms", "local_ms"]]]
        megabytes = "" if pd.isna(busiest["bytes"]) else f"{busiest['bytes'] / 1e6:.2f}"
        sent, metadata = rows["bytes"].sum(), rows["metadata_bytes"].sum()
        share = f"{metadata / sent:.1%}" if sent and metadata else ""
        wrong = f"{rows['num_wrong'].sum():.0f}" if times[0] else ""
        table.add_row(name, *times, megabytes, share, wrong)

    for call in CALLS:
        rows = counted[counted["phase"] == call]
        add(call, rows[rows["stage"] == "all"])
        for stage, stage_rows in rows[rows["stage"] != "all"].groupby("stage"):
            add(f"  {stage}", stage_rows)
        table.add_section()
    steps = counted[counted["phase"] == "step"]
    add("all four", steps)
    for (phase, stage), rows in counted[counted["phase"].isin(COPIES)].groupby(["phase", "stage"]):
        add(f"{phase}: {stage}", rows)
    dimensions = dimensions_of(counted[counted["phase"] == "dispatch"]).value_counts(normalize=True)
    table.caption = (
        f"Busiest of {records['num_ranks'].iloc[0]} ranks, median of {steps['iteration'].nunique()} iterations. "
        f"d: {', '.join(f'{d} ({share:.0%})' for d, share in dimensions.items())}. "
        f"Net, with what copies of experts need: {steps.groupby('iteration')['net_ms'].max().median():.2f} ms. "
        f"Peak memory of a rank: {steps['peak_memory_bytes'].max() / 1e6:.0f} MB."
    )
    return table


def _planned(records: pd.DataFrame, title: str) -> Table:
    """What a placement policy takes on one rank."""
    counted = records[records["counted"]]
    table = _table(title)
    for stage, rows in counted.groupby("stage", sort=False):
        sent = f", {rows['bytes'].median() / 1e6:.2f} MB are summed" if rows["bytes"].notna().any() else ""
        table.add_row(f"{stage}, of a layer and step", f"{rows['planning_ms'].median():.2f} ms{sent}")
    table.caption = f"Median of {counted['iteration'].nunique()} iterations; {records['num_ranks'].iloc[0]} GPUs."
    return table


def _predicted(records: pd.DataFrame, title: str) -> Table:
    counted = records[records["counted"]]
    steps = counted[counted["phase"] == "step"]
    every_step = records[records["phase"] == "step"]
    table = _table(title)
    if steps.empty:  # a self-test: timings made up of the constants
        for stage, rows in counted.groupby("stage", sort=False):
            table.add_row(f"made-up timings of {stage}", f"{len(rows)}, {rows['bytes'].max() / 1e6:.1f} MB at most")
        return table
    first, last = steps["iteration"].min(), steps["iteration"].max()
    table.add_row("the four AlltoAlls of a step and layer (predicted)", f"{steps['predicted_ms'].mean():.2f} ms")
    table.add_row("counted iterations", f"{first}-{last} of {len(every_step)}")
    dimensions = dimensions_of(steps).value_counts()
    table.add_row("dimension d", ", ".join(f"{d} ({n / len(steps):.0%})" for d, n in dimensions.items()))
    calls = counted[counted["phase"].isin(CALLS)]
    for (call, stage), rows in calls.groupby(["phase", "stage"], sort=False):
        of_one = f"{rows['predicted_ms'].mean():.2f} ms, {rows['bytes'].mean() / 1e6:.1f} MB"
        which = "one AlltoAll" if (calls["phase"] == "dispatch").all() else call
        table.add_row(f"stage {stage}, of {which}", of_one)
    for level, rows in counted[counted["phase"] == "routing"].groupby("stage", sort=False):
        table.add_row(f"duplication per {level}", f"{1 - rows['rows'].sum() / rows['pairs'].sum():.1%}")
    if steps["expert_rows_max"].notna().all():
        skew = (steps["expert_rows_max"] / steps["expert_rows_mean"]).mean()
        table.add_row("busiest GPU's expert rows / mean", f"{skew:.2f}")
    if steps["dropped_pairs"].any():
        table.add_row("dropped pairs", f"{steps['dropped_pairs'].sum() / steps['pairs'].sum():.1%}")
    if every_step["moved_experts"].any():
        table.add_row("experts moved", f"{every_step['moved_experts'].sum():.0f} in {len(every_step)} iterations")
    return table


def dimensions_of(rows: pd.DataFrame) -> pd.Series:
    """d of each row, where it is known: ``2``, or in chunks ``2x4``."""
    known = rows.dropna(subset=["dimension"]).astype({"dimension": int}).fillna({"chunks": 1})
    chunks = "x" + known["chunks"].astype(int).astype(str)
    return known["dimension"].astype(str) + chunks.where(known["chunks"] > 1, "")
