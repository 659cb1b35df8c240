"""The answer as files: advice.html, advice.md, and figures with their numbers."""

import hashlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from hiermoe.advice import figures, figures_of_change, recommendation
from hiermoe.advice import phrases as wording
from hiermoe.advice.answer_tables import Answer, exchange_words
from hiermoe.advice.systems import BASELINE
from hiermoe.analysis.figures.spec import DPI
from hiermoe.analysis.figures.style import SETTINGS
from hiermoe.analysis.render import environment, to_html
from hiermoe.analysis.whole_step import PUBLISHED_SHARES, step_speedup
from hiermoe.records.provenance import collect

Rows = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """A figure of the page, and a table below it, its header first."""

    name: str
    heading: str
    title: str
    caption: str
    draw: Callable[[Answer, str], Figure]
    table: pd.DataFrame
    rows: Rows = ()


def write_page(answer: Answer, folder: Path, routing_file: Path | None) -> Path:
    """Write everything into a folder.

    Args:
        answer: what to say.
        folder: made where it is not there.
        routing_file: that routing came from, to be named by its content; None for what was drawn.

    Returns:
        The page.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    shown = list(sections(answer))
    for section in shown:
        with mpl.rc_context(SETTINGS):
            section.draw(answer, section.title).savefig(folder / "figures" / f"{section.name}.png", dpi=DPI)
        section.table.to_csv(folder / "figures" / f"{section.name}.csv", index=False)
    answer.end_to_end.to_csv(folder / "figures" / "end_to_end.csv", index=False)
    answer.crossing.to_csv(folder / "figures" / "crossing_bytes.csv", index=False)
    case = answer.assessment.case
    title = f"Would it help? {case.routing_words[0].upper()}{case.routing_words[1:]} on {case.cluster.name}"
    made = collect()
    text = (
        environment()
        .get_template("advice.md.j2")
        .render(
            title=title,
            headline=wording.headline(answer),
            why=wording.why(answer),
            conditions=list(wording.conditions(answer)),
            case=case,
            num_seen=answer.assessment.num_seen,
            num_held_out=answer.assessment.num_held_out,
            figures=shown,
            not_applicable=answer.assessment.left_out,
            leaves_out=wording.LEAVES_OUT,
            rules=recommendation,
            command=" ".join(["hiermoe", "advise", *sys.argv[1:]]),
            commit=(made["commit"] or "unknown")[:10],
            uncommitted_changes=made["uncommitted_changes"],
            time=made["time"],
            versions={name: made["versions"][name] for name in ("python", "torch", "numpy")},
            constants=[
                (f"{peers}: {exchange_words(peers, answer.assessment)}", case.cluster.constants(peers))
                for peers in case.cluster.exchanges
            ],
            digest=routing_file and hashlib.sha256(routing_file.read_bytes()).hexdigest()[:16],
        )
    )
    (folder / "advice.md").write_text(text, encoding="utf-8")
    page = folder / "advice.html"
    page.write_text(to_html(text, title, folder), encoding="utf-8")
    return page


def sections(answer: Answer) -> Iterator[Section]:
    """The figures that there is something for, in the order of the page."""
    n = answer.assessment.num_held_out
    interval = (
        " In brackets: 95 % interval over them (block bootstrap, paired)." if answer.assessment.has_intervals else ""
    )
    yield Section(
        "overview",
        "In short",
        wording.title_of_overview(answer),
        f"Predicted times, mean of {n} held-out iterations; numbers beside the bars: speed-up over Megatron-LM's flat "
        "AlltoAll. Right: compute stays as it is, nothing overlaps; cost of moving experts spread over "
        f"{recommendation.HORIZON_STEPS} steps.",
        figures.overview,
        answer.systems,
        tuple(_step_rows(answer)),
    )
    yield Section(
        "systems",
        "Every system",
        wording.title_of_systems(answer),
        f"Time of the four AlltoAlls of a step by stage, mean of {n} held-out iterations. Dotted: the flat AlltoAll. "
        "d: stages of the AlltoAll, of HD-MoE and HierMoE the cheapest of every step (d\\*). Slower than "
        f"{figures.SLOWEST_SHOWN:g} "
        f"times the flat AlltoAll: in the table only.{interval}",
        figures.systems,
        answer.systems,
        tuple(system_rows(answer)),
    )
    yield Section(
        "traffic",
        "Duplication and traffic",
        wording.title_of_traffic(answer),
        f"Exact counts, mean of {n} held-out iterations, experts in their first places (right: where each system has "
        "put them). A row counts where it leaves the outermost group that it leaves; hierarchical systems pass rows on "
        "inside.",
        figures.traffic,
        answer.assessment.levels,
        tuple(_level_rows(answer)),
    )
    if len(answer.updates):
        yield Section(
            "placement",
            "What placement brings",
            wording.title_of_placement(answer),
            f"The placement after so many updates, judged on {n} held-out iterations, against the same dispatch with "
            "fixed "
            "experts. Right: after all updates; moving full optimizer state at the link's rate, spread over the steps.",
            figures_of_change.placement,
            answer.updates,
            tuple(_update_rows(answer)),
        )
    yield Section(
        "sensitivity",
        "What would change the answer",
        wording.title_of_sensitivity(answer),
        "One assumption changed at a time, the same counts priced anew. Fewer tokens: bytes scaled, unevenness kept.",
        figures_of_change.sensitivity,
        answer.sensitivity,
        tuple(_assumption_rows(answer)),
    )


def system_rows(answer: Answer) -> Iterator[tuple[str, ...]]:
    """The table of systems, by rising time."""
    yield (
        "system", "AlltoAll, ms a step", "speed-up", "d", "updates", "moving experts, once",
        "step at its present share", "to this model the same",
    )  # fmt: skip
    share = answer.assessment.case.share
    for _, row in answer.systems.iterrows():
        name = row["label"] + (" (drops tokens)" if row["lossy"] else "")
        shares = PUBLISHED_SHARES if share is None else (share,)
        yield (
            f"**{name}**" if row["system"] == answer.found.chosen else name,
            f"{row['step_ms']:.2f}{answer.mark}",
            speedup_cell(answer, row),
            row["dimensions"],
            str(row["updates"] or ""),
            f"{row['moved_ms']:.0f} ms" if row["moved_ms"] else "",
            " to ".join(f"{step_speedup(x, row['communication']):.2f}" for x in shares) + answer.mark,
            row["also"],
        )


def speedup_cell(answer: Answer, row: pd.Series) -> str:
    """Speed-up over the flat AlltoAll, with its interval where there is one."""
    if row["system"] == BASELINE:
        return "1"
    interval = "" if math.isnan(row["low"]) else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['speedup']:.2f}{answer.mark}{interval}"


def _step_rows(answer: Answer) -> Iterator[tuple[str, ...]]:
    names = list(answer.end_to_end.columns[1:])
    yield ("AlltoAll's share of the step now", *(f"step under {answer.label(name)}" for name in names))
    own = answer.assessment.case.share
    shares = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6} | ({own} if own is not None else set[float]())
    for share in sorted(shares):
        cells = [f"{step_speedup(share, answer.communication(name)):.2f}×{answer.mark}" for name in names]
        yield (f"{share:.0%}{' (yours)' if share == own else ''}", *cells)


def _level_rows(answer: Answer) -> Iterator[tuple[str, ...]]:
    names = list(answer.crossing.columns[2:])
    unknown = ("any routing with this K",) if answer.mark else ()
    sent = (f"MB a GPU sends across it, {answer.label(name)}" for name in names)
    counted = (
        "level",
        "groups",
        "pairs a step",
        "distinct (token, group)",
        "duplication",
        "all experts equally likely",
    )
    yield (*counted, *unknown, *sent)
    for (_, level), (_, crossing) in zip(answer.assessment.levels.iterrows(), answer.crossing.iterrows(), strict=True):
        bounds = (f"{level['lowest']:.0%} to {level['highest']:.0%}",) if answer.mark else ()
        yield (
            level["name"], str(level["groups"]), f"{level['pairs']:.0f}", f"{level['distinct']:.0f}{answer.mark}",
            f"{level['duplication']:.1%}{answer.mark}", f"{level['independent']:.1%}", *bounds,
            *(f"{crossing[name] / 1e6:.3g}{answer.mark}" for name in names),
        )  # fmt: skip


def _update_rows(answer: Answer) -> Iterator[tuple[str, ...]]:
    yield (
        "system", "updates", "steps until then", "experts moved", "AlltoAll, ms a step", "speed-up over fixed experts",
        "moving, ms", "paid back after, steps",
    )  # fmt: skip
    for name, rows in answer.updates.groupby("system", sort=False):
        kept = rows[rows["updates"].isin({8, 32}) | (rows["updates"] == rows["updates"].max())]
        for _, row in kept.iterrows():
            interval = f" [{row['low']:.3f}, {row['high']:.3f}]" if answer.assessment.has_intervals else ""
            pays = row["break_even_steps"]
            yield (
                answer.label(str(name)), str(row["updates"]), str(row["step"]), str(row["moved_experts"]),
                f"{row['step_ms']:.2f}{answer.mark}", f"{row['value']:.3f}{answer.mark}{interval}",
                f"{row['moved_ms']:.0f}",
                "never" if math.isinf(pays) else f"{pays:.0f}{answer.mark}",
            )  # fmt: skip


def _assumption_rows(answer: Answer) -> Iterator[tuple[str, ...]]:
    followed = answer.label(answer.followed)
    yield ("assumption", f"AlltoAll speed-up of {followed}, moving included", "answer then")
    answers = {"stay": "stay with the flat AlltoAll", "unresolved": "not resolved"}
    for row in answer.sensitivity.itertuples():
        chosen = answers.get(str(row.outcome), f"use {answer.label(str(row.chosen))}")
        yield (str(row.assumption), f"{row.value:.2f}×{answer.mark}", f"**{chosen}**" if row.flips else chosen)
