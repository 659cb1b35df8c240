"""Layers of a pipeline's files, numbered through the model: which rank is of which stage, which line of which chunk.

Ranks of a stage follow each other in Megatron's usual order (stages outermost), so the i-th of P equal parts of the
sorted ranks is stage i, and the ranks at one place of all stages hold the same tokens. A stage with V chunks runs them
in turn, P micro-batches each, as Megatron's interleaved schedule does; the model's order is chunk after chunk, in each
stage after stage. A chunk has as many layers as the highest number in it says: layers without experts at its end are in
no file. What comes out is checked: equal tokens in all stages, equal layers in all forwards of a chunk.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from hiermoe.routing.importers.recording import Source


@dataclass(frozen=True)
class Line:
    """What one router chose in one forward.

    Attributes:
        layer: its number as in the file.
        ids_TK: uint16 [T, K].
        place: which line of which file it is.
    """

    layer: int
    ids_TK: np.ndarray
    place: str


Forwards = dict[tuple[int, int], list[Line]]
"""Lines of every (step, rank), in the order of the file."""


def numbered_through(source: Source, forwards: Forwards, through_model: bool) -> tuple[dict[int, Forwards], str]:
    """Lines by the model's layer, ranks by their place in a stage; and a note on how, empty where nothing was done.

    Args:
        source: what was asked for.
        forwards: as in the files.
        through_model: whether all lines say that layers are numbered through the model.

    Raises:
        ValueError: it is not known whether the ranks are of one stage or lines of one chunk, or they do not fit what
            was said.
    """
    stages, chunks = 1, 1
    ranks = sorted({rank for _, rank in forwards})
    if len(ranks) % (source.pipeline or 1):
        raise ValueError(f"{source.path}: pipeline={source.pipeline} does not divide its {len(ranks)} ranks")
    if (source.pipeline or 1) == 1 and (source.chunks or 1) > 1:
        raise ValueError(
            f"{source.path}: chunks={source.chunks} are of an interleaved pipeline: say --pipeline P, above 1"
        )
    if through_model:
        if (source.pipeline or 1) > 1 or (source.chunks or 1) > 1:
            raise ValueError(f"{source.path}: its layers are numbered through the model; leave pipeline and chunks out")
    else:
        _ask(source, forwards, ranks)
        stages, chunks = source.pipeline or 1, source.chunks or 1
    each = len(ranks) // stages
    parts: dict[tuple[int, int], dict[int, Forwards]] = {}  # of (chunk, stage): lines of a layer by (step, place)
    for (step, rank), lines in sorted(forwards.items(), key=lambda one: one[0]):
        stage, place = divmod(ranks.index(rank), each)
        rank = ranks[place]  # the first stage's stands for all
        for chunk, line in _with_chunks(lines, stages, chunks):
            part = parts.setdefault((chunk, stage), {})
            part.setdefault(line.layer, {}).setdefault((step, rank), []).append(line)
    numbered: dict[int, Forwards] = {}
    first = 0
    for key in sorted(parts):
        for layer in sorted(parts[key]):
            numbered[first + layer] = parts[key][layer]
        first += max(parts[key]) + 1
    if stages * chunks == 1:
        return numbered, ""
    return numbered, (
        f"Layers are numbered on through {stages} stages of a pipeline with {chunks} chunks each, ranks in Megatron's "
        "usual order."
    )


def _ask(source: Source, forwards: Forwards, ranks: list[int]) -> None:
    """Refuse what may be read in two ways."""
    tell = "say --pipeline P, the stages that the files are of (1: no pipeline)"
    if source.pipeline is None and len(ranks) > 1:
        of_rank: dict[int, set[int]] = {rank: set() for rank in ranks}
        for (_, rank), lines in forwards.items():
            of_rank[rank].update(line.layer for line in lines)
        odd = next((rank for rank in ranks if of_rank[rank] != of_rank[ranks[0]]), None)
        if odd is not None:
            shown = " and ".join(f"rank {rank} has layers {sorted(of_rank[rank])}" for rank in (ranks[0], odd))
            raise ValueError(f"{source.path}: {shown}, as stages of a pipeline have: {tell}")
        possible = [stages for stages in range(2, len(ranks) + 1) if _may_be_stages(forwards, ranks, stages)]
        if not possible:
            return
        raise ValueError(
            f"{source.path}: this format counts layers within a stage of a pipeline, and its {len(ranks)} ranks may be "
            f"of one stage or of {' or '.join(map(str, possible))}: {tell}"
        )
    if source.pipeline == 1 or source.chunks is not None:
        return
    for (step, rank), lines in forwards.items():
        layer, times = Counter(line.layer for line in lines).most_common(1)[0]
        if times > 1:
            shown = (
                f"rank {rank} has {times} lines of layer {layer} in step {step}, micro-batches or chunks of the model"
            )
            more = (
                tell
                if source.pipeline is None
                else "say --chunks V, the chunks of a stage (1: no interleaved pipeline)"
            )
            raise ValueError(f"{source.path}: {shown}: {more}")


def _may_be_stages(forwards: Forwards, ranks: list[int], stages: int) -> bool:
    """Whether ranks at one place of all stages may have the same tokens: their micro-batches are as long.

    A rank's file may be cut, so that one has lengths which another one lacks speaks only where both do.
    """
    each, rest = divmod(len(ranks), stages)
    if rest:
        return False
    lengths = {key: {len(line.ids_TK) for line in lines} for key, lines in forwards.items()}
    steps = sorted({step for step, _ in forwards})
    pairs = [(first, rank) for place, first in enumerate(ranks[:each]) for rank in ranks[place + each :: each]]
    for step in steps:
        for first, rank in pairs:
            a, b = lengths.get((step, first), set()), lengths.get((step, rank), set())
            if not (a <= b or b <= a):
                return False
    return True


def _with_chunks(lines: list[Line], stages: int, chunks: int) -> list[tuple[int, Line]]:
    """Every line of a step and rank with its chunk.

    Raises:
        ValueError: forwards do not divide over the chunks, or those of a chunk have unequal layers.
    """
    if chunks == 1:
        return [(0, line) for line in lines]
    forwards: list[list[Line]] = []
    for line in lines:  # a forward goes up through the layers of its chunk
        if not forwards or line.layer <= forwards[-1][-1].layer:
            forwards.append([])
        forwards[-1].append(line)
    batches, rest = divmod(len(forwards), chunks)
    if rest:
        raise ValueError(f"{lines[0].place}: the {len(forwards)} forwards of its step and rank are not {chunks} chunks")
    schedule = [
        chunk
        for start in range(0, batches, stages)
        for chunk in range(chunks)
        for _ in range(start, min(start + stages, batches))
    ]
    layers: dict[int, list[int]] = {}
    for chunk, forward in zip(schedule, forwards, strict=True):
        found = [line.layer for line in forward]
        if layers.setdefault(chunk, found) != found:
            raise ValueError(
                f"{forward[0].place}: layers {found} where chunk {chunk} has {layers[chunk]}: pipeline={stages} and "
                f"chunks={chunks} do not fit"
            )
    return [(chunk, line) for chunk, forward in zip(schedule, forwards, strict=True) for line in forward]
