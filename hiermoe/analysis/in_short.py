"""What a report says first: one sentence, one figure, six lines, all of it from the verdicts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hiermoe.analysis.figures import main_figure, style
from hiermoe.analysis.figures.spec import FigureSpec, Words, render
from hiermoe.analysis.verdicts import Judged
from hiermoe.analysis.wording import METRICS

WORDS = {"simulated": "predicted", "emulated": "measured on an emulated cluster", "cluster": "measured on a cluster"}


@dataclass(frozen=True)
class Line:
    """One of the six: what it answers, and the answer."""

    name: str
    text: str


def draw(judged: Sequence[Judged], labels: dict[str, str], folder: Path) -> Words | None:
    """Draw the main figure; None where there is no number yet.

    Args:
        judged: all claims.
        labels: of the systems.
        folder: of the figures.

    Returns:
        Its title, and as the caption the sentence that the report begins with.
    """
    table = main_figure.table(judged, labels)

    def words(_: pd.DataFrame) -> Words:
        measured = ", ".join(WORDS[x] for x in table["source"].unique() if x != "simulated")
        title = "AlltoAll speed-up over Megatron-LM: published, predicted" + (f", {measured}" if measured else "")
        return Words(title, sentence(table), ())

    spec = FigureSpec("main", "", "", lambda *_: table, main_figure.draw, words)
    return render(spec, table, folder, spec.name)


def sentence(table: pd.DataFrame) -> str:
    """What HierMoE reaches beside what the paper says.

    Args:
        table: of the main figure, not empty.
    """
    routing = "recorded" if "recorded" in set(table["routing"]) else "uniform"
    rows = table[(table["system"] == "hiermoe") & (table["routing"] == routing)]
    parts = []
    for source, found in rows.groupby("source", sort=False):
        reached = " and ".join(
            f"{row['value']:.2f} times as fast, {row['published']:.2f} published, for {style.model(str(row['model']))}"
            for _, row in found.iterrows()
        )
        parts.append(f"{WORDS[str(source)].capitalize()}: {reached}.")
    return f"HierMoE's AlltoAll over Megatron-LM's, on {routing} routing. {' '.join(parts)}"


def six_lines(judged: Sequence[Judged], labels: Mapping[str, str]) -> list[Line]:
    """What holds, what does not, what depends on routing, what was not testable, how sure, on what."""
    predicted = [one for one in judged if one.case and one.case.source == "simulated"]
    lead = "recorded" if any(one.routing == "recorded" for one in predicted) else "uniform"
    on_lead = [one for one in predicted if one.routing == lead]
    return [
        Line("Holds", _holds(on_lead, lead)),
        Line("Does not", _does_not(on_lead, lead, labels)),
        Line("Depends on routing", _depends(predicted, labels)),
        Line("Not testable", _not_testable(judged)),
        Line("How sure", _how_sure(judged)),
        Line("On what", _on_what(judged)),
    ]


def _holds(judged: Sequence[Judged], routing: str) -> str:
    counts = Counter(one.verdict for one in judged)
    tested = sum(counts[verdict] for verdict in ("reproduced", "same direction", "contradicted"))
    return (
        f"{counts['reproduced']} of {tested} published numbers that could fail, on {routing} routing; "
        f"{counts['same direction']} more point the same way."
    )


def _does_not(judged: Sequence[Judged], routing: str, labels: Mapping[str, str]) -> str:
    contradicted = [one for one in judged if one.verdict == "contradicted"]
    if not contradicted:
        return f"Nothing published is contradicted on {routing} routing."
    return f"{len(contradicted)} numbers on {routing} routing: {_who(contradicted, labels)}."


def _depends(predicted: Sequence[Judged], labels: Mapping[str, str]) -> str:
    verdicts: dict[tuple[object, ...], dict[str, Judged]] = {}
    for one in predicted:
        assert one.case is not None
        key = (one.claim.claim, one.case.model, one.case.baseline, one.case.condition)
        verdicts.setdefault(key, {})[one.routing] = one
    both = [found for found in verdicts.values() if {"recorded", "uniform"} <= found.keys()]
    if not both:
        return "There are numbers on one routing alone."
    turned = [
        found["recorded"]
        for found in both
        if (found["recorded"].verdict == "contradicted") != (found["uniform"].verdict == "contradicted")
    ]
    if not turned:
        return "No verdict turns into its opposite between recorded and uniform routing."
    return f"{len(turned)} numbers are contradicted on recorded or on uniform routing alone: {_who(turned, labels)}."


def _not_testable(judged: Sequence[Judged]) -> str:
    answered = {one.claim.claim for one in judged if one.verdict != "not testable"}
    left = list({one.claim.claim: one.claim for one in judged if one.claim.claim not in answered}.values())
    if not left:
        return "Every published number was tested on something."
    kinds = Counter(METRICS[claim.metric] for claim in left)
    return f"{len(left)} numbers: " + ", ".join(f"{kind} ({number})" for kind, number in kinds.items()) + "."


def _how_sure(judged: Sequence[Judged]) -> str:
    widths = [
        (one.estimate.high - one.estimate.low) / (2 * one.estimate.value)
        for one in judged
        if one.estimate.n and one.claim.metric == "a2a_speedup"
    ]
    known = f"Half of all intervals are within ± {np.median(widths):.1%}: " if widths else "Intervals are "
    return f"{known}over the iterations of one run. They say nothing of other trainings, models or clusters."


def _on_what(judged: Sequence[Judged]) -> str:
    sources = {one.case.source for one in judged if one.case and one.estimate.n}
    parts = [
        "Predicted: exact traffic of routing that small siblings of both models made, priced with the paper's α and β"
    ]
    parts += [f"{WORDS[source]}: real dispatchers" for source in ("emulated", "cluster") if source in sources]
    if not sources & {"emulated", "cluster"}:
        parts.append("nothing was measured in this report")
    return "; ".join(parts) + "."


def _who(judged: Sequence[Judged], labels: Mapping[str, str]) -> str:
    """Which systems over which, or of what is of no system what it is, and how often."""
    found: list[str] = []
    for one in judged:
        system, baseline = one.claim.system, one.case.baseline if one.case else one.claim.baseline
        of = [labels.get(name, name) for name in (system, baseline) if name]
        found.append(" over ".join(of) or METRICS[one.claim.metric])
    return ", ".join(f"{what} ({number})" for what, number in Counter(found).most_common())
