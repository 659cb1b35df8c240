"""`hiermoe published`: what is predicted of measurements that others published, and how far off that is."""

import time
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hiermoe.analysis.others.held_page import (
    KIND_WORDS,
    hold_against_others,
    in_one_sentence,
    verdict,
    write_held,
    write_held_reference,
)
from hiermoe.analysis.others.own_rows import OwnHeld, hold_own
from hiermoe.analysis.others.trust import Held
from hiermoe.commands.arguments import Parser
from hiermoe.records.project import REPORTS, shown
from hiermoe.records.whole_file import write_whole

OWN_ROWS = REPORTS / "published_own.csv"


def main(arguments: list[str]) -> None:
    """Predict, print, write.

    Raises:
        ValueError: the rows or their rules are broken.
        OSError: a file is missing or cannot be written.
    """
    parser = Parser(
        prog="hiermoe published",
        description="What is predicted of measurements that others published, against what they measured.",
    )
    parser.add_argument("--rows", type=Path, help="rows of your own too, a CSV file of the same columns")
    parser.add_argument("--entries", type=Path, help="what they are, a YAML file like reports/measurements.yaml")
    parser.add_argument("--reference", action="store_true", help="also the small copy that is committed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started, console = time.perf_counter(), Console(highlight=False)
    if options.entries is not None and options.rows is None:
        parser.error("--entries says what rows of your own are: --rows is missing")
    own = None if options.rows is None else hold_own(options.rows, options.entries)
    held = hold_against_others() if own is None else own.shipped
    page = write_held(held)
    console.print(_table(held))
    for reason, count in held.reasons:
        console.print(f"· {count} not predicted: {escape(reason)}")
    console.print(f"\n[bold]{escape(in_one_sentence(held))}[/bold]")
    console.print(f"Asked of ratios: median {held.rules.targets.median:g}. {verdict(held.kind('ratio'), held)}")
    if own is not None:
        console.print(_own_table(own))
        for one in own.listed:
            console.print(f"· {escape(one.row.id)} not predicted: {escape(one.reason)}")
        write_whole(OWN_ROWS, own.table.round(6).to_csv(index=False).encode())
        console.print(f"rows of your own: {shown(OWN_ROWS)}", soft_wrap=True)
    console.print(f"{time.perf_counter() - started:.0f} s · page: {shown(page)}", soft_wrap=True)
    if options.reference:
        console.print(shown(write_held_reference()))


def _own_table(own: OwnHeld) -> Table:
    """The user's rows, each beside the suite's of the same kind, cluster and reach."""
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for i, column in enumerate(("rows of your own", "published", "predicted", "factor", "shipped alike")):
        table.add_column(column, justify="right" if i else "left", no_wrap=bool(i))
    for row in own.table.to_dict("records"):
        alike = f"{row['shipped_factor']:.2f} ({row['shipped_rows']})" if row["shipped_rows"] else "none"
        numbers = (f"{row[name]:.4g}" for name in ("published", "predicted"))
        table.add_row(escape(str(row["id"])), *numbers, f"{row['factor']:.2f}", alike)
    return table


def _table(held: Held) -> Table:
    """Errors by kind, and below each by source."""
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for i, column in enumerate(("predicted / published", "rows", "median", "90 % within", "lean", "right")):
        table.add_column(column, justify="right" if i else "left", no_wrap=bool(i))
    for kind in held.kinds:
        for one in (kind, *(source for source in held.sources if source.name[0] == kind.name[0])):
            words = KIND_WORDS[one.name[0]] if one is kind else f"  {one.name[1]}"
            numbers = ("", "", "", f"{one.right}")
            if one.name[0] != "order":
                numbers = (f"{one.median:.2f}", f"{one.most:.2f}", f"{one.lean:.2f}", "")
            table.add_row(escape(words), str(len(one.rows)), *numbers, style="bold" if one is kind else "")
    return table
