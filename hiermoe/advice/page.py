"""The answer as files: advice.html, advice.md, and figures with their numbers."""

import math
import sys
from pathlib import Path

import matplotlib as mpl

from hiermoe.advice import figures, figures_of_change, phrases, recommendation
from hiermoe.advice.answer_tables import Answer, exchange_words
from hiermoe.advice.case import Question
from hiermoe.advice.with_copies import expert_tflops
from hiermoe.analysis.figures.spec import DPI
from hiermoe.analysis.figures.style import SETTINGS
from hiermoe.analysis.render import environment, to_html
from hiermoe.records.provenance import collect
from hiermoe.records.run_id import file_digest
from hiermoe.records.whole_file import whole, write_whole
from hiermoe.topology.placement_files import write_placements

FIGURES = {  # in the order of the page
    "overview": (phrases.title_of_overview, figures.overview),
    "layers": (phrases.title_of_layers, figures.layers),
    "systems": (phrases.title_of_systems, figures.systems),
    "traffic": (phrases.title_of_traffic, figures.traffic),
    "placement": (phrases.title_of_placement, figures_of_change.placement),
    "sensitivity": (phrases.title_of_sensitivity, figures_of_change.sensitivity),
}


def write_page(answer: Answer, folder: Path, question: Question) -> Path:
    """Write everything into a folder.

    Args:
        answer: what to say.
        folder: made where it is not there.
        question: that was asked; files that routing came from are named by their content.

    Returns:
        The page.
    """
    tables = {
        "overview": answer.systems,
        "layers": answer.layers,
        "systems": answer.systems,
        "traffic": answer.assessment.levels,
        "placement": answer.updates,
        "sensitivity": answer.sensitivity,
        "copies": answer.copies,
        "end_to_end": answer.end_to_end,
        "crossing_bytes": answer.crossing,
    }
    tables = {name: table for name, table in tables.items() if len(table)}
    for name, table in tables.items():
        write_whole(folder / "figures" / f"{name}.csv", table.to_csv(index=False).encode())
    placed = _write_placements(answer, folder, question.num_layers)
    titles = {name: title_of(answer) for name, (title_of, _) in FIGURES.items() if name in tables}
    for name, title in titles.items():
        with mpl.rc_context(SETTINGS), whole(folder / "figures" / f"{name}.png") as path:
            FIGURES[name][1](answer, title).savefig(path, dpi=DPI)
    case, made = answer.assessment.case, collect()
    title = f"Would it help? {case.routing_words[0].upper()}{case.routing_words[1:]} on {case.cluster.name}"
    template = environment().get_template("advice.md.j2")
    text = template.render(
        title=title,
        headline=phrases.headline(answer),
        conditions=phrases.conditions(answer),
        answer=answer,
        case=case,
        titles=titles,
        slowest_shown=figures.SLOWEST_SHOWN,
        exchange_words=exchange_words,
        isfinite=math.isfinite,
        rules=recommendation,
        expert_tflops=expert_tflops(case),
        command=" ".join(["hiermoe", "advise", *sys.argv[1:]]),
        made=made,
        placed=placed,
        digests=[(path.name, file_digest(path)) for path in question.files],
    )
    write_whole(folder / "advice.md", text.encode())
    page = folder / "advice.html"
    write_whole(page, to_html(text, title, folder).encode())
    return page


def _write_placements(answer: Answer, folder: Path, num_layers: int | None) -> list[str]:
    """Where the answer has experts, as files; none where it leaves them, or where the conditions say why.

    Returns:
        Names of the files.
    """
    if answer.found.outcome != "placement" or phrases.why_no_files(answer):
        return []
    return [path.name for path in write_placements(folder, answer.own.placements, num_layers)]
