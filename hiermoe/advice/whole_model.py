"""All layers of a model as one question: each is assessed alone, in processes of its own, and their times add up."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from hiermoe.advice.assessment import Assessed, Assessment, assess, update_row
from hiermoe.advice.case import Case, Question
from hiermoe.advice.held_out import HeldOutLayers
from hiermoe.advice.recommendation import HORIZON_STEPS
from hiermoe.advice.systems import Candidate
from hiermoe.advice.with_copies import summed_copies
from hiermoe.analysis.statistics import ratio_of_sums
from hiermoe.ranks.server import preload
from hiermoe.ranks.workers import worker_pools


def assess_layers(
    question: Question,
    systems: Sequence[Candidate],
    left_out: Sequence[tuple[str, str]],
    finished: Callable[[int], None],
    workers: int | None = None,
    with_copies: Sequence[Candidate] = (),
) -> Assessment:
    """Assess every layer, and add them up.

    Args:
        question: of a whole model.
        systems: the flat AlltoAll first.
        left_out: of systems that do not apply, to be told.
        finished: called with the number of every layer that is done.
        workers: processes; None for one a core.
        with_copies: systems of the table of copies.

    Raises:
        ValueError: a process was killed.
    """
    preload("hiermoe.advice.whole_model")
    count = min(workers or os.cpu_count() or 1, len(question.cases))
    layers: list[Assessment] = []
    with worker_pools(1, count, "") as (pool,):
        running = [pool.submit(_assess_layer, replace(one), systems, left_out, with_copies) for one in question.cases]
        for case, future in zip(question.cases, running, strict=True):
            layers.append(replace(future.result(), case=case))  # this process has the routing already
            finished(case.layer)
    return summed(question, layers)


def _assess_layer(
    case: Case,
    systems: Sequence[Candidate],
    left_out: Sequence[tuple[str, str]],
    with_copies: Sequence[Candidate],
) -> Assessment:
    """In a process of its own; what the case has kept of its routing meanwhile stays there."""
    return replace(assess(case, systems, left_out, with_copies=with_copies), case=replace(case))


def summed(question: Question, layers: Sequence[Assessment]) -> Assessment:
    """The layers of a model as one assessment.

    A layer whose moved experts would not pay back within `HORIZON_STEPS` keeps them where they are. That is chosen by
    the held-out steps themselves.
    """
    case = replace(question.cases[0], routing_words=question.words, layer=0)
    assessed: list[Assessed] = []
    for position, first in enumerate(layers[0].systems):
        parts = [layer.systems[position] for layer in layers]
        moved = [pays(part, layer) for part, layer in zip(parts, layers, strict=True)]
        own = HeldOutLayers(tuple(part.held_out if x else part.fixed for part, x in zip(parts, moved, strict=True)))
        fixed = HeldOutLayers(tuple(part.fixed for part in parts))
        placements = {
            layer.case.layer: part.placements[layer.case.layer] if x else layer.case.first_places
            for part, layer, x in zip(parts, layers, moved, strict=True)
        }
        flat = assessed[0].held_out if assessed else own
        speedup = ratio_of_sums(flat.step_ms(case.cluster), own.step_ms(case.cluster))
        updates = pd.DataFrame()
        if first.candidate.moves:
            last = [part.updates.iloc[-1] for part, x in zip(parts, moved, strict=True) if x]
            updates = _updates(first.candidate, last, fixed.step_ms(case.cluster), own.step_ms(case.cluster))
        assessed.append(Assessed(first.candidate, own, fixed, placements, speedup, updates))
    fallen = [f"layer {layer.case.layer}, {layer.collapsed}" for layer in layers if layer.collapsed is not None]
    return replace(
        layers[0],
        case=case,
        systems=tuple(assessed),
        levels=_levels(layers),
        collapsed="; ".join(fallen) or None,
        layers=tuple(layers),
        copies=summed_copies([layer.copies for layer in layers]),
    )


def pays(part: Assessed, layer: Assessment) -> bool:
    """Whether a layer's moved experts save more than they cost within `HORIZON_STEPS`."""
    cluster = layer.case.cluster
    saved_ms = float((part.fixed.step_ms(cluster) - part.held_out.step_ms(cluster)).mean())
    return part.moved_ms < HORIZON_STEPS * saved_ms


def _updates(candidate: Candidate, last: Sequence[pd.Series], fixed_ms: np.ndarray, own_ms: np.ndarray) -> pd.DataFrame:
    """As `Assessed.updates`, before the first and after the last, of all layers that move together."""
    none = {"updates": 0, "step": 0, "moved_experts": 0}
    moved = {
        "updates": int(sum(row["updates"] for row in last)),
        "step": int(max((row["step"] for row in last), default=0)),
        "moved_experts": int(sum(row["moved_experts"] for row in last)),
    }
    rows = [update_row(candidate, none, fixed_ms, fixed_ms, 0.0)]
    if last:
        rows.append(update_row(candidate, moved, fixed_ms, own_ms, float(sum(row["moved_ms"] for row in last))))
    return pd.DataFrame(rows)


def _levels(layers: Sequence[Assessment]) -> pd.DataFrame:
    """As `Assessment.levels`: pairs and distinct pairs of all layers, the rest over all of them."""
    levels = layers[0].levels.copy()
    for column in ("pairs", "distinct"):
        levels[column] = np.sum([layer.levels[column].to_numpy() for layer in layers], axis=0)
    levels["duplication"] = 1 - levels["distinct"] / levels["pairs"]
    return levels
