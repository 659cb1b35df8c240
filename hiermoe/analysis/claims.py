"""What was published (results/published.csv) and how each kind of number is judged (reports/claims.yaml).

What others published of systems with copies is read the same way, from files of its own.
"""

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from pydantic import Field

from hiermoe.records.project import PUBLISHED, RULES, shown
from hiermoe.records.strict import Strict, checked

TESTBED_RANKS = 32  # claims are about the paper's testbed unless their condition says otherwise
BEST_OF = "best of "

# Conditions of published.csv as values of the runs that answer them.
CONDITIONS: tuple[tuple[str, Any], ...] = (
    (r"groups=(\d+) K=(\d+)", lambda m: {"topk": int(m[2])}),
    (r"([KEG])=(\d+)", lambda m: {"experiment": f"table4_{m[1].lower()}{m[2]}"}),
    (r"max=(\w+)", lambda m: {"max_function": m[1]}),
    (r"update every (\d+)", lambda m: {"interval": int(m[1])}),
    (r"gamma in 5\.\.19", lambda m: {}),
    (r"4 nodes and 1 node", lambda m: {}),
    (
        r"(\d+) GPUs E=(\d+) (\d+) tokens",
        lambda m: {"num_ranks": int(m[1]), "num_experts": int(m[2]), "tokens_per_rank": int(m[3])},
    ),
    (r"4 nodes|first MoE layer|worst of seven AlltoAlls|", lambda m: {"num_ranks": TESTBED_RANKS}),
)


class Rule(Strict):
    """How one metric is judged."""

    rule: Literal["value", "speedup", "order", "at_most", "ceiling", "factor"]
    reason: str
    tolerance: float = Field(default=0.0, ge=0)  # value, at_most, ceiling: absolute; speedup, factor: relative
    near: float = Field(default=0.0, ge=0)  # ceiling, factor: how far off is still the same direction, as the tolerance
    least_effect: float = Field(default=0.0, ge=0, le=1)  # speedup: least share of the published log ratio
    not_testable: dict[str, str] = Field(default_factory=dict)  # source -> why
    constructed: dict[str, str] = Field(default_factory=dict)  # source -> why


class ConstructedPair(Strict):
    """Two systems whose order a simulation cannot fail to show."""

    system: str
    baseline: str
    holds: Literal["value", "direction"]
    reason: str


class Rules(Strict):
    """reports/claims.yaml."""

    sweeps: dict[str, str]
    baseline_sweep: str
    metrics: dict[str, Rule]
    constructed_pairs: tuple[ConstructedPair, ...]
    over_places: str  # how a claim is judged over several places of a routing
    headline: tuple[str, ...]

    def constructed_pair(self, system: str, baseline: str) -> ConstructedPair | None:
        """What is known of two systems before any run, if anything."""
        for pair in self.constructed_pairs:
            if (pair.system, pair.baseline) == (system, baseline):
                return pair
        return None


@dataclass(frozen=True)
class Claim:
    """One row of published.csv; ``low`` or ``high`` is NaN where the paper gives only one end."""

    claim: str
    where: str
    model: str
    metric: str
    system: str
    baseline: str
    condition: str
    low: float
    high: float
    note: str

    @property
    def baselines(self) -> tuple[str, ...]:
        """Systems compared with; ``best of a b`` is one baseline."""
        if not self.baseline:
            return ("",)
        return (self.baseline,) if self.baseline.startswith(BEST_OF) else tuple(self.baseline.split())

    @property
    def wanted(self) -> dict[str, Any]:
        """Values of the runs that answer the claim.

        Raises:
            ValueError: a condition that nothing here understands.
        """
        values: dict[str, Any] = {} if self.model in ("", "both") else {"model": self.model}
        for pattern, meaning in CONDITIONS:
            match = re.fullmatch(pattern, self.condition)
            if match:
                return values | meaning(match)
        raise ValueError(f"claim {self.claim}: condition {self.condition!r} is not understood")

    def sweep(self, rules: Rules) -> str:
        """The sweep that answers the claim: the longest key of ``sweeps`` that where and condition start with."""
        place = f"{self.where} {self.condition}"
        keys = [key for key in rules.sweeps if f"{place} ".startswith((f"{key} ", f"{key}="))]
        if not keys:
            raise ValueError(f"claim {self.claim}: no sweep answers {place!r}")
        return rules.sweeps[max(keys, key=len)]

    @property
    def published(self) -> str:
        """The published number as text, e.g. ``1.18-1.27``, ``< 1``."""
        if math.isnan(self.low):
            return f"< {self.high:g}" if self.metric.endswith("order") else f"≤ {self.high:g}"
        if self.low == self.high or ";" in self.metric:
            return f"{self.low:g}" if self.low == self.high else f"{self.low:g}; {self.high:g}"
        return f"{self.low:g}–{self.high:g}"


CLAIM_WORDS = [each.name for each in fields(Claim) if each.type is str]


def load_claims(path: Path = PUBLISHED) -> list[Claim]:
    """All published claims, in the order of the file."""
    table = pd.read_csv(path, dtype=dict.fromkeys(CLAIM_WORDS, str)).fillna(dict.fromkeys(CLAIM_WORDS, ""))
    return [Claim(**row) for row in table.to_dict("records")]  # type: ignore[arg-type] - columns are the fields


def load_rules(path: Path = RULES) -> Rules:
    """The rules.

    Raises:
        ValueError: the file breaks the schema.
    """
    return checked(yaml.safe_load(path.read_text()), Rules, shown(path))
