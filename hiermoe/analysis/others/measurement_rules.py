"""reports/measurements.yaml: what each published row is in this suite's terms, or what it lacks."""

import re
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

from hiermoe.analysis.others.published_rows import Measurement
from hiermoe.records.choices import unknown
from hiermoe.records.project import SHIPPED, shown
from hiermoe.records.strict import Strict, checked

MEASUREMENT_RULES = SHIPPED / "reports" / "measurements.yaml"
Kind = Literal["ratio", "absolute", "order"]


class Targets(Strict):
    """Asked of ratio rows: the median and a share of them within a factor each."""

    median: PositiveFloat
    share: PositiveFloat
    within: PositiveFloat


class SystemOf(Strict):
    """The suite's systems that stand for a published one.

    Attributes:
        across: several nodes.
        inside: one node, or one NVLink domain.
        choice_bytes: as a run's `wire.choice_bytes`.
    """

    across: str
    inside: str
    choice_bytes: NonNegativeInt = 0


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RoutingOf:
    """Where routing comes from; nothing of these: uniform, or with the group limit that the row states.

    Attributes:
        trace: model whose recorded routing is drawn from.
        groups: that experts are split into.
        of_a_token: groups that a token may use.
        pattern: of AlltoAlls without experts: to all GPUs of other nodes, or to those of equal lane alone.
    """

    trace: str | None = None
    groups: PositiveInt | None = None
    of_a_token: PositiveInt | None = None
    pattern: Literal["other_node", "own_rail"] | None = None


class RowRule(Strict):
    """What rows are.

    Attributes:
        ids: a pattern of their whole ids.
        reason: why they are not predicted.
        baseline: whether ratio rows are over them, and they are not judged themselves.
        kind: how they are judged.
        over: id of the row whose time is divided by theirs, with groups of ``ids`` in it.
        baseline_system: published name of the system that they are a speed-up over.
        cluster: name in conf/cluster/.
        one_domain: nodes share one domain of links, so a token goes straight to each GPU.
        counts: what a bandwidth's bytes count, of a token: its nodes (or in one node its GPUs), or its choices.
        routing: which experts tokens choose.
        assumed: what the source does not state and is taken for granted.
    """

    ids: str
    reason: str | None = None
    baseline: bool = False
    kind: Kind | None = None
    over: str | None = None
    baseline_system: str | None = None
    cluster: str | None = None
    one_domain: bool = False
    counts: Literal["groups", "selections"] = "groups"
    routing: RoutingOf = RoutingOf()
    assumed: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum([self.reason is not None, self.baseline, self.kind is not None]) != 1:
            raise ValueError(f"ids={self.ids}: one of reason, baseline and kind says what becomes of the rows")
        if self.reason is None and self.cluster is None:
            raise ValueError(f"ids={self.ids}: no cluster says where they were measured")
        if self.kind in ("ratio", "order") and (self.over is None) == (self.baseline_system is None):
            raise ValueError(f"ids={self.ids}: a {self.kind} needs over or baseline_system")
        return self


class StartUpRule(Strict):
    """Rows that a start-up is learnt from, and rows that it is applied to: patterns of their ids."""

    learnt_from: str
    applied_to: str


class Small(Strict):
    """Up to where a row tells of start-up: tokens of a GPU, or bytes of an AlltoAll without experts."""

    tokens: PositiveInt
    bytes: PositiveInt


class Cause(Strict):
    """Why rows are far off, and what supports that."""

    ids: str
    cause: str
    evidence: str


class OwnEntries(Strict):
    """What rows of the user's own are: as in the file, patterns of ids and, where they are new, published systems."""

    rows: tuple[RowRule, ...]
    systems: dict[str, SystemOf] = Field(default_factory=dict)


class MeasurementRules(Strict):
    """The file.

    Attributes:
        targets: of ratio rows.
        far_off: factor from which on a fabric's median needs a cause.
        overlap: of the stages of a system that sends in chunks (:class:`hiermoe.topology.cluster.Cluster`).
        systems: by published name.
        rows: what rows are.
        start_up: a second look at some of them.
        small: which rows are small.
        causes: why some are far off.
    """

    targets: Targets
    far_off: PositiveFloat
    overlap: float = Field(ge=0, le=1)
    systems: dict[str, SystemOf]
    rows: tuple[RowRule, ...]
    start_up: StartUpRule
    small: Small
    causes: tuple[Cause, ...] = ()

    def of(self, row: Measurement) -> RowRule:
        """The one rule of a row.

        Raises:
            ValueError: none or several are, or its system is not known.
        """
        found = [rule for rule in self.rows if re.fullmatch(rule.ids, row.id)]
        if len(found) != 1:
            raise ValueError(
                f"id={row.id}: {len(found)} entries of reports/measurements.yaml (or --entries) are of it, not one"
            )
        if found[0].reason is None:
            for system in filter(None, (row.system, found[0].baseline_system)):
                if system not in self.systems:
                    raise unknown("system", system, self.systems)
        return found[0]

    def beside(self, own: OwnEntries) -> Self:
        """With entries of the user's own.

        Raises:
            ValueError: a system of that name is there already.
        """
        if both := self.systems.keys() & own.systems.keys():
            raise ValueError(f"systems.{min(both)} is one of reports/measurements.yaml; choose another name")
        return self.model_copy(update={"rows": (*self.rows, *own.rows), "systems": {**self.systems, **own.systems}})

    def divided(self, row: Measurement) -> str:
        """Id of the row whose time is divided by a row's; empty where there is none."""
        rule = self.of(row)
        match = re.fullmatch(rule.ids, row.id)
        return match.expand(rule.over) if match and rule.over else ""

    def causes_of(self, row: Measurement) -> list[Cause]:
        """Why a row is far off, as far as that is known."""
        return [cause for cause in self.causes if re.fullmatch(cause.ids, row.id)]


def load_measurement_rules(path: Path = MEASUREMENT_RULES) -> MeasurementRules:
    """The rules.

    Raises:
        ValueError: the file breaks the schema.
    """
    return checked(yaml.safe_load(path.read_text(encoding="utf-8")), MeasurementRules, shown(path))
