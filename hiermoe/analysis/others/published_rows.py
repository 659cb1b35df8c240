"""The rows of results/published_measurements.csv: what others measured, at which setting, and where it is from."""

import csv
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from hiermoe.records.project import SHIPPED, shown
from hiermoe.records.strict import Strict, checked

MEASUREMENTS = SHIPPED / "results" / "published_measurements.csv"
BANDWIDTHS = ("logical_gb_per_s", "bus_gb_per_s")
TIMES_MS = {"time_ms": 1.0, "time_us": 1e-3}
Metric = Literal["time_ms", "time_us", "logical_gb_per_s", "bus_gb_per_s", "speedup_over"]


class Measurement(Strict):
    """One row. What its source does not state is None, or empty.

    Attributes:
        id: of the row.
        source: where it was published.
        date: when.
        gpus: that exchange.
        nodes: that they are in.
        gpus_per_node: of each.
        fabric: links, as far as the source states them.
        system: what moved the tokens, as the source calls it.
        phase: dispatch, combine, both, an AlltoAll without experts, or a whole training step.
        bytes_per_gpu: that a GPU sends in an AlltoAll without experts, its own share included.
        tokens_per_gpu: T.
        hidden: M.
        dtype: of what dispatch sends.
        num_experts: E.
        topk: K.
        group_limit: as the source has it; ``4 of 8``: a token's experts are in 4 of 8 groups.
        routing: which experts tokens choose.
        metric: what ``value`` is: a time, bytes that the source counts over time, nccl-tests' bus bandwidth, or how
            many times as fast as ``baseline``.
        value: the number.
        baseline: of a speed-up.
        notes: more on the setting.
    """

    id: str = Field(min_length=1)
    source: str = Field(min_length=1)
    date: str
    gpus: PositiveInt
    nodes: PositiveInt
    gpus_per_node: PositiveInt
    fabric: str
    system: str
    phase: Literal["dispatch", "combine", "both", "alltoall", "e2e_step"]
    bytes_per_gpu: PositiveInt | None
    tokens_per_gpu: PositiveInt | None
    hidden: PositiveInt | None
    dtype: Literal["bf16", "fp8", "bf16/fp8", "raw"] | None
    num_experts: PositiveInt | None
    topk: PositiveInt | None
    group_limit: str | None
    routing: str
    metric: Metric
    value: PositiveFloat
    baseline: str | None
    notes: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gpus != self.nodes * self.gpus_per_node:
            raise ValueError(f"gpus={self.gpus} are not nodes={self.nodes} x gpus_per_node={self.gpus_per_node}")
        if (self.metric == "speedup_over") != (self.baseline is not None):
            raise ValueError(f"baseline={self.baseline} does not fit metric={self.metric}")
        return self


def load_measurements(path: Path = MEASUREMENTS) -> list[Measurement]:
    """All rows, in the order of the file.

    Raises:
        ValueError: a column that is missing or too many, a value that breaks a rule, or an id that stands twice.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if set(reader.fieldnames or ()) != set(Measurement.model_fields):
            lacking = sorted(set(Measurement.model_fields) ^ set(reader.fieldnames or ()))
            raise ValueError(f"{shown(path)}: columns {', '.join(lacking)} are missing or too many")
        found: dict[str, Measurement] = {}
        for number, values in enumerate(reader, start=2):
            optional = [name for name, field in Measurement.model_fields.items() if _may_be_none(field.annotation)]
            values |= {name: values[name] or None for name in optional}
            row = checked(values, Measurement, f"{shown(path)}, line {number} ({values['id']})")
            if row.id in found:
                raise ValueError(f"{shown(path)}, line {number}: id={row.id} stands twice")
            found[row.id] = row
    return list(found.values())


def _may_be_none(annotation: object) -> bool:
    return type(None) in getattr(annotation, "__args__", ())
