"""How far predictions of others' measurements can be trusted: errors by kind, by source, by fabric and system."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hiermoe.analysis.others.foretold import Foretold, Listed
from hiermoe.analysis.others.measurement_rules import Cause, MeasurementRules
from hiermoe.analysis.others.start_up import StartUp, with_start_up

MOST = 0.9  # share of rows that the wide range of a group holds


@dataclass(frozen=True)
class Trust:
    """Errors of a group of rows, as factors.

    Attributes:
        name: of the group.
        rows: in it.
        median: of the factors by which predictions are off, from 1 on.
        most: factor that 90 % of them are within.
        lean: median of predicted over published; of times below 1: we are too fast.
        within: share of rows within the factor that the rules ask of most.
        right: of order rows, how many.
    """

    name: tuple[str, ...]
    rows: tuple[Foretold, ...]
    median: float
    most: float
    lean: float
    within: float
    right: int

    @classmethod
    def of(cls, name: tuple[str, ...], rows: Sequence[Foretold], within: float) -> "Trust":
        """Of at least one row."""
        errors = np.array([one.log_error for one in rows])
        sizes = np.abs(errors)
        return cls(
            name=name,
            rows=tuple(rows),
            median=float(np.exp(np.median(sizes))),
            most=float(np.exp(np.quantile(sizes, MOST))),
            lean=float(np.exp(np.median(errors))),
            within=float((sizes <= np.log(within)).mean()),
            right=sum(one.is_right_order for one in rows),
        )


@dataclass(frozen=True)
class Held:
    """All rows and what they say.

    Attributes:
        predicted: rows.
        listed: rows, with what they lack.
        kinds: errors of ratio and of absolute rows; how many order rows are right.
        sources: by kind and source.
        reaches: of absolute rows, by where their bytes go.
        fabrics: of ratio and absolute rows, by kind, fabric and system.
        rules: what was asked, and causes.
    """

    predicted: tuple[Foretold, ...]
    listed: tuple[Listed, ...]
    kinds: tuple[Trust, ...]
    sources: tuple[Trust, ...]
    reaches: tuple[Trust, ...]
    fabrics: tuple[Trust, ...]
    rules: MeasurementRules

    @classmethod
    def of(cls, predicted: Sequence[Foretold], listed: Sequence[Listed], rules: MeasurementRules) -> "Held":
        """Group the rows."""

        def grouped(*names: str) -> tuple[Trust, ...]:
            groups: dict[tuple[str, ...], list[Foretold]] = {}
            for one in predicted:
                groups.setdefault(tuple(_value(one, name) for name in names), []).append(one)
            return tuple(Trust.of(name, rows, rules.targets.within) for name, rows in groups.items())

        fabrics = tuple(one for one in grouped("kind", "fabric", "system") if one.name[0] != "order")
        reaches = tuple(one for one in grouped("kind", "reach") if one.name[0] == "absolute")
        return cls(tuple(predicted), tuple(listed), grouped("kind"), grouped("kind", "source"), reaches, fabrics, rules)

    def kind(self, name: str) -> Trust | None:
        """Errors of a kind; None where it has no row."""
        return next((one for one in self.kinds if one.name == (name,)), None)

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Why rows are listed, and how many each, most first."""
        return Counter(one.reason for one in self.listed).most_common()

    @property
    def second_look(self) -> StartUp | None:
        """Rows with a start-up that others say."""
        return with_start_up(self.predicted, self.rules.start_up)

    @property
    def causes(self) -> list[tuple[Cause, Trust]]:
        """Every cause, and the errors of the rows that it is of, named after their fabrics and systems."""
        found = []
        for cause in self.rules.causes:
            rows = [one for one in self.predicted if cause in self.rules.causes_of(one.row)]
            if rows:
                names = dict.fromkeys(f"{one.row.system} on {one.fabric}" for one in rows)
                found.append((cause, Trust.of(tuple(names), rows, self.rules.targets.within)))
        return found

    @property
    def unexplained(self) -> list[Trust]:
        """Fabrics and systems further off than the rules allow without a cause, of which there is none."""
        far = [one for one in self.fabrics if one.median > self.rules.far_off]
        return [one for one in far if not any(self.rules.causes_of(row.row) for row in one.rows)]

    @property
    def unassumed(self) -> Trust | None:
        """Absolute rows for which nothing was taken for granted; None where there is none."""
        rows = [one for one in self.predicted if one.kind == "absolute" and not one.assumed]
        return Trust.of(("absolute", "unassumed"), rows, self.rules.targets.within) if rows else None


def _value(one: Foretold, name: str) -> str:
    return str(getattr(one, name) if hasattr(one, name) else getattr(one.row, name))
