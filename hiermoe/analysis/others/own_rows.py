"""Measurements of the user's own, predicted beside those that the suite has."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from hiermoe.analysis.others.foretold import Foretold, Listed, foretell, to_table
from hiermoe.analysis.others.measurement_rules import MeasurementRules, OwnEntries, load_measurement_rules
from hiermoe.analysis.others.published_rows import Measurement, load_measurements
from hiermoe.analysis.others.trust import Held
from hiermoe.records.project import shown
from hiermoe.records.strict import checked


@dataclass(frozen=True)
class OwnHeld:
    """Rows of the user's own. The suite's are judged without them.

    Attributes:
        predicted: rows.
        listed: rows, with what they lack.
        shipped: all rows of the suite.
    """

    predicted: tuple[Foretold, ...]
    listed: tuple[Listed, ...]
    shipped: Held

    @property
    def table(self) -> pd.DataFrame:
        """As :func:`to_table`, and how far off the suite's rows of the same kind, cluster and reach are.

        Columns more:
            shipped_rows: how many.
            shipped_factor: median of their factors; NaN where there is none.
        """
        alike = [[x.factor for x in self.shipped.predicted if _place(x) == _place(one)] for one in self.predicted]
        medians = [float(np.median(factors)) if factors else np.nan for factors in alike]
        return to_table(self.predicted).assign(shipped_rows=[len(some) for some in alike], shipped_factor=medians)


def _place(one: Foretold) -> tuple[str, ...]:
    return one.kind, one.fabric, one.reach


def hold_own(csv: Path, entries: Path | None) -> OwnHeld:
    """Predict the rows of a file beside the suite's.

    Args:
        csv: of the columns of results/published_measurements.csv.
        entries: what they are, as reports/measurements.yaml has it: ``rows``, and ``systems`` that are not there.

    Raises:
        ValueError: rows or entries are broken, or the suite has a row or system of that name.
        OSError: a file is missing.
    """
    rules, rows, shipped = load_measurement_rules(), load_measurements(csv), load_measurements()
    if both := {row.id for row in rows} & {row.id for row in shipped}:
        raise ValueError(f"{shown(csv)}: id={min(both)} is a row of the suite; choose another")
    if entries is not None:
        rules = rules.beside(checked(yaml.safe_load(entries.read_text(encoding="utf-8")), OwnEntries, shown(entries)))
    return _split(rows, shipped, rules)


def _split(rows: Sequence[Measurement], shipped: Sequence[Measurement], rules: MeasurementRules) -> OwnHeld:
    """All in one go, since a ratio may be over a row of the other file."""
    predicted, listed = foretell([*rows, *shipped], rules)
    mine = {row.id for row in rows}
    own, theirs = ([x for x in predicted if (x.row.id in mine) is own] for own in (True, False))
    lacking, left = ([x for x in listed if (x.row.id in mine) is own] for own in (True, False))
    return OwnHeld(tuple(own), tuple(lacking), Held.of(theirs, left, rules))
