"""`hiermoe records`: what records there are, filtered, as a table for the eye or as a file for pandas."""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hiermoe.analysis.frames import typical_ms
from hiermoe.commands.arguments import Parser
from hiermoe.records.index import Renewal
from hiermoe.records.store import RunStore
from hiermoe.records.table import differing, read_records
from hiermoe.records.whole_file import write_whole
from hiermoe.runs.columns import column_meanings
from hiermoe.runs.stale import renewals, stale_runs

DESCRIPTION = """What records there are in results/runs/. One line a run here; every row and column with to=FILE.

  hiermoe records
  hiermoe records system=megatron,hiermoe model=qwen3_30b_a3b_paper tokens_per_rank=1024
  hiermoe records measure=predict phase=step counted=true to=steps.csv
  hiermoe records system.policy.gamma=5 to=gamma.parquet

A filter is the name of a column and one value or several with commas, null for an empty cell. Stale records, which
other code has made, are left out, counted, and named with the command that renews them; stale=true shows them alone.
Damaged records, whose files are not what was written, are left out and named.
"""
NAMES = ("system", "model", "cluster", "routing")
MOST_LINES = 40
MOST_NAMES = 4  # of damaged records, for each thing that is wrong
_OWNERS = {"num_experts": "model", "topk": "model", "num_ranks": "cluster"}  # whose option a column is


def main(arguments: list[str]) -> None:
    """Entry of the command.

    Raises:
        ValueError: a filter that no record can fit, or a file of an unknown kind.
    """
    parser = Parser(
        prog="hiermoe records", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "filters", nargs="*", metavar="COLUMN=VALUE", help="what rows must have; to=FILE.csv or .parquet"
    )
    parser.add_argument("--columns", action="store_true", help="what every column means")
    given = parser.parse_args(arguments)
    console = Console(highlight=False)
    if given.columns:
        print_columns(console)
        return
    wanted = dict(_pair(text) for text in given.filters)
    target = None if "to" not in wanted else Path(",".join(wanted.pop("to")))
    if target is not None and target.suffix not in (".csv", ".parquet"):
        raise ValueError(f"to={target}: a file ends in .csv or .parquet")
    asked = ",".join(wanted.pop("stale", ["false"]))
    if asked not in ("true", "false"):
        raise ValueError(f"stale={asked}: true or false")
    store = RunStore()
    stale = stale_runs(store)
    old = {run.run_id for run in stale}
    damaged = store.damaged()
    shown = [run_id for run_id in store.run_ids() if run_id not in damaged and (run_id in old) == (asked == "true")]
    rows = read_records(wanted, store, shown)
    if target is not None:
        _export(rows, target)
        console.print(f"{len(rows)} rows of {rows['run_id'].nunique()} runs: {target}", soft_wrap=True)
        console.print("hiermoe records --columns says what each column means")
    elif len(rows):
        console.print(table(rows))
    elif damaged and not shown and not stale:
        console.print(f"all {len(damaged)} runs in {store.folder} are damaged", soft_wrap=True)
    else:
        of = "none is stale" if asked == "true" and not shown else f"none of {len(shown)} runs is as asked"
        console.print(f"{of}: {store.folder}", soft_wrap=True)
    print_stale(renewals(stale), console)
    print_damaged(damaged, console)
    for command, count in Counter(store.command(run_id) for run_id in damaged).items():
        told = "no command is told" if command is None else f"made by: {command}"
        console.print(f"  {told}   ({count})", soft_wrap=True, markup=False)


def print_columns(console: Console) -> None:
    """What every column means, narrow enough for any terminal."""
    for name, meaning in column_meanings().items():
        console.print(f"[cyan]{escape(name)}[/cyan]")
        console.print(f"    {escape(meaning)}", soft_wrap=not console.is_terminal)


def print_stale(stale: Sequence[Renewal], console: Console) -> None:
    """How many records are stale, and what renews them."""
    count = sum(len(renewal.run_ids) for renewal in stale)
    if not count:
        return
    console.print(f"[yellow]{count} stale[/yellow], made by other code than the present. These commands renew them:")
    for renewal in stale:
        console.print(f"  {renewal.command}   ({len(renewal.run_ids)})", soft_wrap=True, markup=False)


def print_damaged(damaged: Mapping[str, str], console: Console) -> None:
    """Which records are damaged, by what is wrong with them."""
    if not damaged:
        return
    console.print(
        f"[yellow]{len(damaged)} damaged[/yellow] and left out; whatever asks for these runs makes them anew:"
    )
    by_reason: dict[str, list[str]] = {}
    for run_id, why in damaged.items():
        by_reason.setdefault(why, []).append(run_id)
    for why, run_ids in by_reason.items():
        more = f" and {len(run_ids) - MOST_NAMES} more" if len(run_ids) > MOST_NAMES else ""
        console.print(f"  {', '.join(run_ids[:MOST_NAMES])}{more}: {why}", soft_wrap=True, markup=False)


def table(rows: pd.DataFrame) -> Table:
    """One line a run: what it is, AlltoAll in the iterations that count, and what it has that is not usual.

    Usual is what most runs of the same system (model, cluster, routing) have of the system's (...) own options.

    Args:
        rows: as :func:`read_records` gives them.
    """
    runs = rows.drop_duplicates("run_id").set_index("run_id").sort_values([*NAMES, "tokens_per_rank"], kind="stable")
    times, varied = _alltoall(rows), differing(runs)
    fixed = [f"{name}={runs[name].iloc[0]}" for name in NAMES if name not in varied]
    found = Table(
        title=f"{len(runs)} run{'s' * (len(runs) > 1)}, {len(rows)} rows"
        + (f"; all {' '.join(fixed)}" if fixed else ""),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        caption_justify="left",
    )
    found.add_column(" · ".join(name for name in NAMES if name in varied) or "run")
    found.add_column("AlltoAll, ms", justify="right", no_wrap=True)
    found.add_column("not as usual")
    unusual = _unusual(runs, [name for name in varied if name not in (*NAMES, "row_bytes")])
    for run_id, run in runs.head(MOST_LINES).iterrows():
        told = unusual[str(run_id)] + ([] if run["status"] == "ok" else [f"{run['status']}: {run['reason']}"])
        ms, names = times.get(run_id), " · ".join(str(run[name]) for name in NAMES if name in varied)
        found.add_row(names or str(run_id), "" if ms is None else f"{ms:.2f}", escape(" ".join(told)))
    found.caption = (
        "AlltoAll: the four of a step and layer in the iterations that count, mean of predicted and median of measured "
        "times. Not as usual: options in which a run differs from most of its system, model, cluster and routing."
    )
    if len(runs) > MOST_LINES:
        found.caption += f"\n{len(runs) - MOST_LINES} more runs: filter, or say to=FILE.csv for all."
    return found


def _unusual(runs: pd.DataFrame, options: Sequence[str]) -> dict[str, list[str]]:
    """What each run has that most runs of the same name have not, as ``option=value``."""
    told: dict[str, list[str]] = {str(run_id): [] for run_id in runs.index}
    for option in options:
        owner = _OWNERS.get(option, option.partition(".")[0])
        for _, values in runs[option].groupby(runs[owner] if owner in NAMES else lambda _: 0, sort=False):
            usual = values.mode(dropna=False).iloc[0]
            for run_id, value in values.items():
                if value != usual and pd.notna(value):
                    told[str(run_id)].append(f"{option}={_short(value)}")
    return told


def _alltoall(rows: pd.DataFrame) -> Mapping[Any, float]:
    """Time of the four AlltoAlls by run, of those that have any."""
    steps = rows[(rows["phase"] == "step") & rows["counted"].astype(bool)]
    return {} if steps.empty else typical_ms(steps).dropna().to_dict()


def _export(rows: pd.DataFrame, target: Path) -> None:
    content = rows.to_csv(index=False).encode() if target.suffix == ".csv" else rows.to_parquet(index=False)
    write_whole(target, content)


def _pair(text: str) -> tuple[str, list[str]]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ValueError(f"{text}: a filter is COLUMN=VALUE")
    return name, value.split(",")


def _short(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) and value.is_integer() else str(value)
