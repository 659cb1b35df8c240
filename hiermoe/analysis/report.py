"""The report: verdicts, figures, findings, provenance; one Markdown text, and the same as a page of its own."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from hiermoe.analysis.claims import Claim, Rules, load_claims, load_rules
from hiermoe.analysis.figures import FIGURES
from hiermoe.analysis.figures.spec import FigureSpec, Words, render
from hiermoe.analysis.findings import findings
from hiermoe.analysis.frames import Results, load
from hiermoe.analysis.in_short import draw as draw_main_figure
from hiermoe.analysis.in_short import six_lines
from hiermoe.analysis.origins import run_provenance, trace_facts
from hiermoe.analysis.render import environment, to_html
from hiermoe.analysis.statements import Statements, statements
from hiermoe.analysis.up_to_date import is_up_to_date, made_from
from hiermoe.analysis.verdicts import VERDICTS, Judged, judge_all, routing_words, to_frame
from hiermoe.analysis.wording import GLYPHS, cell, in_words, number, system_labels
from hiermoe.records.index import Index, Renewal
from hiermoe.records.keep import NONE
from hiermoe.records.project import REPORTS
from hiermoe.records.provenance import collect
from hiermoe.records.store import RunStore
from hiermoe.records.whole_file import write_whole

TITLE = "HierMoE, reproduced"
ROUTINGS = ("recorded", "public", "uniform", "group_limited", NONE)
NO_SOURCE = "none"  # of a claim that no sweep has a run for
SOURCES = ("simulated", "local", "emulated", "cluster")
KINDS = (*SOURCES, NO_SOURCE)
WHERE = {"emulated": "emulated cluster", "cluster": "cluster"}
REFERENCE_WIDTH = 1100  # pixels of a committed figure


@dataclass(frozen=True)
class Section:
    """One figure of the report; ``words`` is None where there was nothing to draw."""

    heading: str
    image: str
    words: Words | None
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What has been written.

    Attributes:
        page: report.html.
        verdicts: as a table.
        is_new: False where a report of the same records was there already.
        damaged: runs whose records were left out of a new one, and what is wrong with them.
    """

    page: Path
    verdicts: pd.DataFrame
    is_new: bool
    damaged: Mapping[str, str] = field(default_factory=dict)


def write_report(
    index: Index, store: RunStore | None = None, folder: Path = REPORTS, stale: Sequence[Renewal] = ()
) -> Report:
    """Write report.html, report.md, CSVs of verdicts and figures/ from the records that are there, unless that is done.

    Args:
        index: runs by sweep.
        store: where their records are.
        folder: where to write.
        stale: records that other code has made, which are left out, with what renews them.
    """
    store = store or RunStore()
    page, table = folder / "report.html", folder / "verdicts.csv"
    made = made_from(index, store, stale)
    if is_up_to_date(page, made):
        return Report(page, pd.read_csv(table, keep_default_na=False, na_values=[""]), is_new=False)
    results = load(index, store)
    claims, rules = load_claims(), load_rules()
    judged = judge_all(claims, rules, results)
    verdicts = to_frame(judged)
    write_whole(table, verdicts.to_csv(index=False).encode())
    of_source = {source: results.of_source(source) for source in SOURCES}
    sections = [
        _section(spec, source, claims, of_source[source], folder) for spec in FIGURES for source in spec.sources
    ]
    labels, others = system_labels(results), statements(of_source["simulated"])
    _write_statements(others, folder / "statements.csv")
    main = draw_main_figure(judged, labels, folder / "figures")
    context = _verdict_context(judged, rules, results) | _provenance_context(results)
    text = (
        environment()
        .get_template("report.md.j2")
        .render(
            title=TITLE,
            main=main,
            lines=six_lines(judged, labels),
            sections=[section for section in sections if section.words],
            absent=[section for section in sections if not section.words],
            others=others,
            rules=rules,
            stale=stale,
            findings=findings(claims, of_source["simulated"]),
            **context,
        )
    )
    write_whole(folder / "report.md", text.encode())
    write_whole(page, to_html(text, TITLE, folder, made).encode())
    return Report(page, verdicts, is_new=True, damaged=results.damaged)


def _write_statements(others: Statements | None, path: Path) -> None:
    """All statements of others that are judged, case by case; no file where there are none."""
    if others is None:
        path.unlink(missing_ok=True)
    else:
        write_whole(path, to_frame(others.judged).to_csv(index=False).encode())


def write_reference(folder: Path = REPORTS / "reference", report: Path = REPORTS) -> Path:
    """Copy report.md and its figures, made smaller, for committing.

    Args:
        folder: where to.
        report: where :func:`write_report` has written.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: there is no report yet.
    """
    text = (report / "report.md").read_text()
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for old in (folder / "figures").glob("*.png"):
        if not old.name.startswith(
            ("advice_", "published_")
        ):  # `hiermoe advise picture=`, `hiermoe published` made them
            old.unlink()
    (folder / "report.md").write_text(text)
    for image in sorted((report / "figures").glob("*.png")):
        small_copy(image, folder / "figures" / image.name)
    return folder


def small_copy(image: Path, target: Path) -> None:
    """A picture of `REFERENCE_WIDTH` and few colours, for committing."""
    with Image.open(image) as full:
        size = (REFERENCE_WIDTH, round(full.height * REFERENCE_WIDTH / full.width))
        small = full.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        small = small.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        target.parent.mkdir(parents=True, exist_ok=True)
        small.save(target, optimize=True)


def _section(spec: FigureSpec, source: str, claims: Sequence[Claim], own: Results, folder: Path) -> Section:
    """Draw one figure of the runs of one source; where there is nothing to draw, say what makes it."""
    name = spec.name if source == "simulated" else f"{spec.name}_{source}"
    words = render(spec, spec.table(own, claims), folder / "figures", name)
    lacking = Counter((r.routing, r.status, r.reason) for r in own.find(spec.sweep) if r.status != "ok")
    left_out = [
        f"{count} run{'s' * (count > 1)} on {routing} routing, {status.replace('_', ' ')}: {reason}"
        for (routing, status, reason), count in lacking.items()
    ]
    if words is None:
        left_out.append(spec.sources[source])
    where = f", {WHERE[source]}" if len(spec.sources) > 1 else ""
    return Section(f"{spec.heading}{where}", f"figures/{name}.png", words, tuple(left_out))


def _verdict_context(judged: Sequence[Judged], rules: Rules, results: Results) -> dict[str, Any]:
    """Counts, the headline table, and all verdicts."""
    labels = system_labels(results)
    by_kind: dict[tuple[str, str], list[Judged]] = {}
    for one in judged:
        by_kind.setdefault((one.case.source if one.case else NO_SOURCE, one.routing), []).append(one)
    present = sorted(by_kind, key=lambda kind: (KINDS.index(kind[0]), ROUTINGS.index(kind[1])))
    counts = {_named(*kind): Counter(one.verdict for one in by_kind[kind]) for kind in present}
    kinds = [kind for kind in present if kind[1] != NONE]
    headline = []
    for name in rules.headline:
        claim = next(one.claim for one in judged if one.claim.claim == name)
        cells = [cell([one for one in by_kind[kind] if one.claim.claim == name]) for kind in kinds]
        missing = [] if "cluster" in {source for source, _ in kinds} else ["–"]
        headline.append((in_words(claim, labels), claim.published, cells + missing))
    columns = [_named(*kind) for kind in kinds]
    if "cluster" not in {source for source, _ in kinds}:
        columns.append("cluster")
    return {
        "verdict_names": VERDICTS,
        "glyphs": GLYPHS,
        "counts": counts,
        "columns": columns,
        "headline": headline,
        "judged": judged,
        "labels": labels,
        "in_words": in_words,
        "number": number,
        "num_claims": len({one.claim.claim for one in judged}),
    }


def _named(source: str, routing: str) -> str:
    """A column's heading; without a source where there was no run to judge."""
    words = {"simulated": "predicted"}.get(source, source)
    return f"{words}, {routing_words(routing)}" if source != NO_SOURCE else "no run"


def _provenance_context(results: Results) -> dict[str, Any]:
    """What made the runs, the traces and this report."""
    made = collect()
    return {
        "command": " ".join([Path(sys.orig_argv[1]).name, *sys.orig_argv[2:]]),
        "commit": (made["commit"] or "unknown")[:10],
        "uncommitted_changes": made["uncommitted_changes"],
        "runs": run_provenance(results),
        "traces": trace_facts(results),
        "sources": [x for x in SOURCES if any(run.source == x for runs in results.runs.values() for run in runs)],
    }
