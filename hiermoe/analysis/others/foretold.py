"""Every published row is either predicted, by exact counts and the planner's price, or listed with what it lacks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from hiermoe.analysis.others.measurement_rules import Kind, MeasurementRules
from hiermoe.analysis.others.published_rows import TIMES_MS, Measurement
from hiermoe.analysis.others.settings import Setting, setting_of
from hiermoe.model import RowBytes
from hiermoe.planner.cost import choose_scheme

Reach = Literal["across", "inside", "small"]
IN_A_RATIO = "the time that ratio rows are over"


@dataclass(frozen=True)
class Foretold:
    """A predicted row.

    Attributes:
        row: what was published.
        kind: how it is judged.
        setting: what it was predicted at.
        schemes: names of those that the planner chose, one for each AlltoAll.
        published: the row's value; of a ratio of two rows, that of their times.
        predicted: the same of ours.
        predicted_ms: time of the row's AlltoAlls.
        log_error: of a ratio ln(predicted / published), of other rows that of the times.
        assumed: what the source does not state.
        reach: where its bytes go: ``across`` nodes, or ``inside`` one node or domain; ``small``: there are few.
    """

    row: Measurement
    kind: Kind
    setting: Setting
    schemes: tuple[str, ...]
    published: float
    predicted: float
    predicted_ms: float
    log_error: float
    assumed: tuple[str, ...]
    reach: Reach

    @property
    def fabric(self) -> str:
        """Name of its cluster's file."""
        return self.setting.cluster.name.partition("@")[0]

    @property
    def measured_ms(self) -> float:
        """The published time of an absolute row."""
        return self.predicted_ms / math.exp(self.log_error)

    @property
    def factor(self) -> float:
        """How far off, from 1 on."""
        return math.exp(abs(self.log_error))

    @property
    def is_right_order(self) -> bool:
        """Whether both say the same of which is faster."""
        return (self.predicted > 1) == (self.published > 1)


@dataclass(frozen=True)
class Listed:
    """A row that is not predicted, and why."""

    row: Measurement
    reason: str


def time_ms(setting: Setting) -> tuple[float, tuple[str, ...]]:
    """Modelled time of all AlltoAlls of a setting, and the schemes that the planner chose."""
    prices = [
        choose_scheme(setting.schemes, setting.counts, setting.cluster, RowBytes.alike(row_bytes))
        for row_bytes in setting.row_bytes
    ]
    return sum(price.alltoall_ms for price in prices), tuple(price.scheme.name for price in prices)


def published_ms(row: Measurement, setting: Setting) -> float:
    """A published time, or that of a published bandwidth, with what its bytes count.

    Raises:
        ValueError: the row is a ratio.
    """
    if row.metric in TIMES_MS:
        return row.value * TIMES_MS[row.metric]
    if row.metric == "bus_gb_per_s":
        assert row.bytes_per_gpu is not None
        return row.bytes_per_gpu * (row.gpus - 1) / row.gpus / (row.value * 1e6)
    if row.metric == "logical_gb_per_s":
        assert row.tokens_per_gpu is not None
        counted = row.tokens_per_gpu * setting.counted_of_a_token * sum(setting.row_bytes)
        return counted / (row.value * 1e6)
    raise ValueError(f"id={row.id}: metric={row.metric} is no time")


def foretell(rows: Sequence[Measurement], rules: MeasurementRules) -> tuple[list[Foretold], list[Listed]]:
    """Give every row its fate.

    Raises:
        ValueError: a row has no rule or several, or sizes that its rule needs are missing.
    """
    predicted, listed = [], []
    by_id = {row.id: row for row in rows}
    for row in rows:
        rule = rules.of(row)
        if rule.reason is not None or rule.baseline:
            listed.append(Listed(row, rule.reason or IN_A_RATIO))
        elif rule.kind == "absolute":
            predicted.append(_absolute(row, rules))
        else:
            predicted.append(_ratio(row, by_id, rules))
    return predicted, listed


def _absolute(row: Measurement, rules: MeasurementRules) -> Foretold:
    rule = rules.of(row)
    setting = setting_of(row, rule, rules)
    (ours, schemes), theirs = time_ms(setting), published_ms(row, setting)
    value = row.value * (ours / theirs if row.metric in TIMES_MS else theirs / ours)
    error = math.log(ours / theirs)
    reach = _reach(row, rules)
    return Foretold(row, "absolute", setting, schemes, row.value, value, ours, error, rule.assumed, reach)


def _reach(row: Measurement, rules: MeasurementRules) -> Reach:
    tokens, sent = row.tokens_per_gpu, row.bytes_per_gpu
    if (tokens is not None and tokens <= rules.small.tokens) or (sent is not None and sent <= rules.small.bytes):
        return "small"
    return "inside" if row.nodes == 1 or rules.of(row).one_domain else "across"


def _ratio(row: Measurement, by_id: dict[str, Measurement], rules: MeasurementRules) -> Foretold:
    rule = rules.of(row)
    assert rule.kind is not None
    setting = setting_of(row, rule, rules)
    ours, schemes = time_ms(setting)
    if other_id := rules.divided(row):
        if other_id not in by_id:
            raise ValueError(f"id={row.id}: there is no row {other_id} to divide by")
        other = by_id[other_id]
        other_setting = setting_of(other, rules.of(other), rules)
        published = published_ms(other, other_setting) / published_ms(row, setting)
    else:
        other_setting = setting_of(row, rule, rules, rule.baseline_system)
        published = row.value
    value = time_ms(other_setting)[0] / ours
    error = math.log(value / published)
    reach = _reach(row, rules)
    return Foretold(row, rule.kind, setting, schemes, published, value, ours, error, rule.assumed, reach)


def to_table(predicted: Sequence[Foretold]) -> pd.DataFrame:
    """One row for each predicted one, in their order."""
    return pd.DataFrame(
        [
            {
                "id": one.row.id,
                "kind": one.kind,
                "source": one.row.source,
                "system": one.row.system,
                "cluster": one.fabric,
                "gpus": one.row.gpus,
                "phase": one.row.phase,
                "reach": one.reach,
                "metric": "ratio" if one.kind != "absolute" else one.row.metric,
                "published": one.published,
                "predicted": one.predicted,
                "predicted_ms": one.predicted_ms,
                "log_error": one.log_error,
                "factor": one.factor,
                "schemes": "+".join(one.schemes),
                "counted_of_a_token": one.setting.counted_of_a_token,
                "row_bytes": "+".join(map(str, one.setting.row_bytes)),
                "assumed": "; ".join(one.assumed),
            }
            for one in predicted
        ]
    )
