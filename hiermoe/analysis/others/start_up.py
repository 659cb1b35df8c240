"""What a call takes on some fabric beyond the model, learnt from small rows, and other rows with it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from hiermoe.analysis.others.foretold import Foretold
from hiermoe.analysis.others.measurement_rules import StartUpRule


@dataclass(frozen=True)
class StartUp:
    """The second look.

    Attributes:
        extra_ms: of one AlltoAll, median of published less predicted over the rows that it is learnt from.
        learnt_from: how many.
        before: rows that it is applied to, as predicted.
        after: the same with it.
    """

    extra_ms: float
    learnt_from: int
    before: tuple[Foretold, ...]
    after: tuple[Foretold, ...]


def with_start_up(predicted: Sequence[Foretold], rule: StartUpRule) -> StartUp | None:
    """Apply what small rows say to others; None where there are none to learn from, or to apply it to.

    Raises:
        ValueError: a row is both learnt from and judged.
    """
    of = [one for one in predicted if re.fullmatch(rule.learnt_from, one.row.id)]
    on = tuple(one for one in predicted if re.fullmatch(rule.applied_to, one.row.id))
    if both := [one.row.id for one in of if one in on]:
        raise ValueError(f"start_up: {', '.join(both)} would be learnt from and judged")
    if not of or not on:
        return None
    extra_ms = median((one.measured_ms - one.predicted_ms) / len(one.setting.row_bytes) for one in of)
    return StartUp(extra_ms, len(of), on, tuple(_slower(one, extra_ms) for one in on))


def _slower(one: Foretold, extra_ms: float) -> Foretold:
    """A row whose AlltoAlls take longer, its baseline's not."""
    slower = 1 + extra_ms * len(one.setting.row_bytes) / one.predicted_ms
    of_time = 1 if one.kind == "absolute" else -1
    is_time = one.kind == "absolute" and one.row.metric.startswith("time")
    return replace(
        one,
        predicted=one.predicted * (slower if is_time else 1 / slower),
        predicted_ms=one.predicted_ms * slower,
        log_error=one.log_error + of_time * float(np.log(slower)),
    )
