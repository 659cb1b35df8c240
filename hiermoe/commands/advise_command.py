"""`hiermoe advise`: progress, a page, and the short of it in the terminal."""

import time
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hiermoe.advice import phrases
from hiermoe.advice.advice_config import AdviceConfig
from hiermoe.advice.answer_tables import Answer
from hiermoe.advice.assessment import assess
from hiermoe.advice.figures import best_of_families
from hiermoe.advice.inputs import resolve
from hiermoe.advice.page import write_page
from hiermoe.advice.systems import WITHOUT_COPIES, candidates, candidates_with_copies
from hiermoe.advice.whole_model import assess_layers
from hiermoe.advice.with_copies import expert_tflops
from hiermoe.analysis.report import small_copy


def advise_and_print(config: AdviceConfig) -> Path:
    """Answer a question.

    Returns:
        The page.

    Raises:
        ValueError: what is given does not fit together.
        OSError: a file is missing or cannot be written.
    """
    torch.set_num_threads(1)
    started, console = time.perf_counter(), Console(highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading routing", total=None)
        question = resolve(config)
        case = question.cases[0]
        named = config.systems
        if named and config.copies:
            named = (*WITHOUT_COPIES, *named)  # of which systems with copies are the alternative
        systems, left_out = candidates(case.cluster, named)
        copying = candidates_with_copies(case.cluster, config.systems) if config.copies else []
        if copying:
            left_out = [(label, why) for label, why in left_out if label not in {one.label for one in copying}]
        if len(question.cases) == 1:
            seen, judged = case.schedules
            steps = len(seen) * sum(one.moves for one in systems) + (len(seen) + len(judged)) * len(copying)
            progress.update(task, total=steps or 1, completed=0)

            def walked(label: str, iteration: int) -> None:
                progress.update(task, description=label, advance=1 if iteration >= 0 else 0)

            assessment = assess(case, systems, left_out, walked, copying)
        else:
            progress.update(task, description="layer by layer", total=len(question.cases), completed=0)
            assessment = assess_layers(
                question, systems, left_out, lambda _layer: progress.advance(task), with_copies=copying
            )
        answer = Answer.of(assessment)
        progress.update(task, description="drawing")
        folder = Path(config.output) if config.output else Path("advice") / case.name  # where the user stands
        page = write_page(answer, folder, question)
        if config.picture is not None:
            small_copy(folder / "figures" / "overview.png", Path(config.picture))
    console.print(
        Panel(escape(phrases.headline(answer)), title=f"{question.words} · {case.cluster.name}", title_align="left")
    )
    if answer.assessment.layers:
        console.print(f"{phrases.title_of_layers(answer)}.")
    for condition in phrases.conditions(answer):
        console.print(f"· {escape(condition)}")
    console.print(_table(answer))
    if len(answer.copies):
        console.print(_table_of_copies(answer))
    files = "".join(f", {path.name}" for path in sorted(folder.glob("placement.*")))
    console.print(f"{time.perf_counter() - started:.0f} s · page: {page}{files}", soft_wrap=True)
    return page


def _table(answer: Answer) -> Table:
    """The best system of every family, fastest first."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for i, column in enumerate(("best of its family", "ms a step", "speed-up", "d*", "moving")):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for _, row in best_of_families(answer).iterrows():
        cells = (
            row["label"],
            f"{row['step_ms']:.2f}{answer.mark}",
            escape(answer.speedup(row["system"])),
            row["dimensions"],
            f"{row['moved_ms']:.0f} ms" if row["moved_ms"] else "",
        )
        table.add_row(*cells, style="bold" if row["system"] == answer.found.chosen else "")
    return table


def _table_of_copies(answer: Answer) -> Table:
    """Systems with copies of experts beside some without, the shortest step of a layer first."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, caption_justify="left")
    columns = ("copies of experts", "net\nms", "with\nexperts", "rows,\nmost / mean", "GB,\na layer", "GB,\nmodel")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for _, row in answer.copies.iterrows():
        memory = (f"{row['layer_gb']:.2f}", f"{row['model_gb']:.2f}" if row["model_gb"] >= 0 else "not known")
        times = (f"{row['net_ms']:.2f}{answer.mark}", f"{row['layer_ms']:.2f}{answer.mark}", f"{row['imbalance']:.2f}")
        table.add_row(str(row["label"]), *times, *(memory if row["copies"] else ("", "")))
    table.caption = (
        f"Of {answer.of_what}. Net: AlltoAlls, weights and gradients of copies; with the busiest GPU's experts at "
        f"{expert_tflops(answer.assessment.case):g} TFLOP/s. GB at a GPU; slots that layers share count once."
    )
    return table
