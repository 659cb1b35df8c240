"""How far published times of one fabric are from those predicted: what a prediction there may be off by."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from hiermoe.analysis.others.foretold import foretell
from hiermoe.analysis.others.measurement_rules import load_measurement_rules
from hiermoe.analysis.others.published_rows import load_measurements

RANGE = (0.05, 0.95)


@dataclass(frozen=True)
class OnFabric:
    """Times of fused dispatch and combine between nodes that others published of a fabric.

    Attributes:
        rows: how many.
        low: published over predicted, of which 5 % are lower.
        high: of which 5 % are higher.
    """

    rows: int
    low: float
    high: float


@cache
def held_on(fabric: str) -> OnFabric | None:
    """Of a cluster's file, by its name; None where nobody has published such times.

    Raises:
        ValueError: the rows or their rules are broken.
    """
    rules = load_measurement_rules()
    rows = [row for row in load_measurements() if (rule := rules.of(row)).cluster == fabric and rule.kind == "absolute"]
    predicted, _ = foretell(rows, rules)
    errors = [-one.log_error for one in predicted if one.reach == "across" and one.row.hidden is not None]
    if not errors:
        return None
    low, high = np.exp(np.quantile(errors, RANGE))
    return OnFabric(len(errors), float(low), float(high))
