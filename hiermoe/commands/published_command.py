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
from hiermoe.analysis.others.published_rows import MEASUREMENTS
from hiermoe.analysis.others.trust import Held
from hiermoe.commands.arguments import Parser
from hiermoe.records.project import shown


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
    parser.add_argument("--rows", type=Path, default=MEASUREMENTS, help="other rows of the same columns (a CSV file)")
    parser.add_argument("--reference", action="store_true", help="also the small copy that is committed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started, console = time.perf_counter(), Console(highlight=False)
    held = hold_against_others(options.rows)
    page = write_held(held)
    console.print(_table(held))
    for reason, count in held.reasons:
        console.print(f"· {count} not predicted: {escape(reason)}")
    console.print(f"\n[bold]{escape(in_one_sentence(held))}[/bold]")
    console.print(f"Asked of ratios: median {held.rules.targets.median:g}. {verdict(held.kind('ratio'), held)}")
    console.print(f"{time.perf_counter() - started:.0f} s · page: {shown(page)}", soft_wrap=True)
    if options.reference:
        console.print(shown(write_held_reference()))


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
