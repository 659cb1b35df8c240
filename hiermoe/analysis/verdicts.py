"""Every published number against ours: the rules of reports/claims.yaml, applied."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from hiermoe.analysis.cases import Case, cases
from hiermoe.analysis.claims import Claim, Rule, Rules
from hiermoe.analysis.frames import Results
from hiermoe.analysis.quantities import METRICS
from hiermoe.analysis.statistics import Estimate
from hiermoe.records.keep import NONE

Verdict = Literal["reproduced", "same direction", "contradicted", "by construction", "not testable"]
VERDICTS: tuple[Verdict, ...] = ("reproduced", "same direction", "contradicted", "by construction", "not testable")
FROM_BEST: tuple[Verdict, ...] = ("reproduced", "same direction", "by construction", "contradicted")
STYLES = dict(zip(VERDICTS, ("green", "yellow", "red", "cyan", "dim"), strict=True))
NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True)
class Judged:
    """One claim, one case of it, and what came out."""

    claim: Claim
    case: Case | None  # None where no sweep has a run for the claim
    estimate: Estimate
    verdict: Verdict
    reason: str

    @property
    def routing(self) -> str:
        """Whose tokens."""
        return self.case.routing if self.case else NONE

    @property
    def ratio(self) -> float:
        """Ours over the nearer published end; 1 inside a published range, NaN without a number."""
        ends = [end for end in (self.claim.low, self.claim.high) if not math.isnan(end)]
        if math.isnan(self.estimate.value):
            return math.nan
        return self.estimate.value / min(max(self.estimate.value, min(ends)), max(ends))


def judge_all(claims: Sequence[Claim], rules: Rules, results: Results) -> list[Judged]:
    """Every claim in every case, in the order of the claims; a claim without any case keeps a row."""
    judged: list[Judged] = []
    for claim in claims:
        found: dict[Case, dict[str, Judged]] = {}
        for case in cases(claim, rules, results):
            anywhere = replace(case, sweep="", place="", systems=(), baselines=())
            found.setdefault(anywhere, {}).setdefault(case.place, _judge_case(case, rules, results))
        judged += [over_places([*each.values()]) for each in found.values()]
        if not found:
            judged.append(Judged(claim, None, NOTHING, "not testable", f"sweep {claim.sweep(rules)} has no such run"))
    return judged


def over_places(judged: Sequence[Judged]) -> Judged:
    """One claim in all places of a routing, as ``over_places`` of the rules says.

    Args:
        judged: the claim in each place, one at least.
    """
    numbered = [one for one in judged if one.estimate.n]
    if len(judged) == 1 or not numbered:
        return judged[0]
    counts = Counter(one.verdict for one in numbered)
    from_best: list[Verdict] = [verdict for verdict in FROM_BEST for one in numbered if one.verdict == verdict]
    reached = from_best[(len(numbered) - 1) // 2]
    values = [one.estimate.value for one in numbered]
    low, high = (pick(numbered, key=lambda one: one.estimate.value) for pick in (min, max))
    assert low.case is not None and high.case is not None
    parts = ", ".join(f"{verdict} in {counts[verdict]}" for verdict in FROM_BEST if counts[verdict])
    ends = f"least in {low.case.place}, most in {high.case.place}"
    without = f"no number in {len(judged) - len(numbered)} more" if len(numbered) < len(judged) else ""
    median = Estimate(float(np.median(values)), low.estimate.value, high.estimate.value, len(values))
    reason = _reason(low.case, f"median of {len(numbered)} places", parts, ends, without)
    return Judged(low.claim, low.case, median, reached, reason)


def _judge_case(case: Case, rules: Rules, results: Results) -> Judged:
    claim, rule = case.claim, rules.metrics[case.claim.metric]
    if case.source in rule.not_testable:
        return Judged(claim, case, NOTHING, "not testable", _reason(case, rule.not_testable[case.source]))
    if case.obstacle:
        return Judged(claim, case, NOTHING, "not testable", _reason(case, case.obstacle))
    quantity = METRICS[claim.metric](case, results)
    pair = rules.constructed_pair(claim.system, case.baseline) if case.source == "simulated" else None
    if case.source in rule.constructed:
        verdict, why = "by construction", rule.constructed[case.source]
    elif pair and pair.holds == "value":
        verdict, why = "by construction", pair.reason
    else:
        verdict, why = judge(quantity.estimate, claim.low, claim.high, rule)
        if pair and verdict == "same direction":
            verdict, why = "by construction", f"{why}, but that alone is given: {pair.reason}"
    return Judged(claim, case, quantity.estimate, verdict, _reason(case, why, quantity.note))


def judge(ours: Estimate, low: float, high: float, rule: Rule) -> tuple[Verdict, str]:
    """Apply one rule.

    Args:
        ours: our number.
        low: published lower end, NaN if there is none.
        high: published upper end.
        rule: of the metric.

    Returns:
        The verdict, and in words what decided it.
    """
    return _RULES[rule.rule](ours, low, high, rule)


def _value(ours: Estimate, low: float, high: float, rule: Rule) -> tuple[Verdict, str]:
    distance = max(low - ours.value, ours.value - high, 0.0)
    if distance <= rule.tolerance:
        return "reproduced", f"within {rule.tolerance:g} of the published value"
    if ours.value > high:
        return "same direction", f"above the published value by {distance:.3f}"
    return "contradicted", f"below the published value by {distance:.3f}"


def _speedup(ours: Estimate, low: float, high: float, rule: Rule) -> tuple[Verdict, str]:
    published_gain = min((low, high), key=lambda ratio: abs(math.log(ratio)))
    side = math.copysign(1.0, math.log(published_gain))
    reach = min(side * math.log(ours.low), side * math.log(ours.high))  # of the interval, away from 1
    if reach <= 0:
        where = "includes 1" if ours.low <= 1 <= ours.high else "is on the other side of 1"
        return "contradicted", f"our interval {where}"
    enough = side * math.log(ours.value) >= rule.least_effect * abs(math.log(published_gain))
    within = low * (1 - rule.tolerance) <= ours.value <= high * (1 + rule.tolerance)
    if within and enough:
        return "reproduced", f"within {rule.tolerance:.0%} of the published ratio"
    if within:
        return "same direction", f"less than {rule.least_effect:.0%} of the published effect"
    return (
        "same direction",
        f"more than {rule.tolerance:.0%} {'above' if ours.value > high else 'below'} the published ratio",
    )


def _order(ours: Estimate, low: float, high: float, rule: Rule) -> tuple[Verdict, str]:
    if ours.high < high:
        return "reproduced", f"the whole interval is below {high:g}"
    if ours.value < high:
        return "same direction", f"below {high:g}, but the interval reaches it"
    return "contradicted", f"not below {high:g}"


def _at_most(ours: Estimate, low: float, high: float, rule: Rule) -> tuple[Verdict, str]:
    limit = high + rule.tolerance
    if ours.high <= limit:
        return "reproduced", f"all of the range is at most {limit:g}"
    if ours.low > limit:
        return "contradicted", f"all of the range is above {limit:g}"
    return "not testable", f"{limit:g} lies inside the range, which depends on what the paper does not say"


def _ceiling(ours: Estimate, low: float, high: float, rule: Rule) -> tuple[Verdict, str]:
    limits: tuple[tuple[Verdict, float], ...] = (
        ("reproduced", high + rule.tolerance),
        ("same direction", high + rule.near),
    )
    for verdict, limit in limits:
        if ours.value <= limit:
            return verdict, f"at most {limit:g}"
    return "contradicted", f"above {limits[-1][1]:g}"


def _factor(ours: Estimate, low: float, high: float, rule: Rule) -> tuple[Verdict, str]:
    steps: tuple[tuple[Verdict, float], ...] = (
        ("reproduced", 1 + rule.tolerance),
        ("same direction", 1 + rule.near),
    )
    for verdict, factor in steps:
        if low / factor <= ours.value <= high * factor:
            return verdict, f"within a factor of {factor:g} of the published range"
    return "contradicted", f"further off than a factor of {steps[-1][1]:g}"


_RULES = {
    "value": _value,
    "speedup": _speedup,
    "order": _order,
    "at_most": _at_most,
    "ceiling": _ceiling,
    "factor": _factor,
}


def _reason(case: Case, *parts: str) -> str:
    """What tells the case from its neighbours, then why, then what else to know."""
    claim = case.claim
    which = [
        case.model if case.model != claim.model and claim.model else "",
        f"over {case.baseline}" if len(claim.baselines) > 1 else "",
        case.condition,
    ]
    derived = "constants of this cluster are partly derived (reading 3)" if case.has_derived_constants else ""
    named = ", ".join(filter(None, which))
    return (f"{named}: " if named else "") + "; ".join(filter(None, [*parts, derived]))


def to_frame(judged: Sequence[Judged]) -> pd.DataFrame:
    """Verdicts as a table: reports/verdicts.csv."""
    return pd.DataFrame(list(_rows(judged)))


def _rows(judged: Sequence[Judged]) -> Iterator[dict[str, object]]:
    for one in judged:
        yield {
            "claim": one.claim.claim,
            "source": one.case.source if one.case else "none",
            "routing": one.routing,
            "published_low": one.claim.low,
            "published_high": one.claim.high,
            "ours": one.estimate.value,
            "ours_low": one.estimate.low,
            "ours_high": one.estimate.high,
            "n": one.estimate.n,
            "ratio": one.ratio,
            "verdict": one.verdict,
            "reason": one.reason,
        }


def routing_words(routing: str) -> str:
    """A routing, by its name, for readers."""
    return {NONE: "no routing", "public": "real models"}.get(routing, routing.replace("_", "-"))


def verdict_summary(verdicts: pd.DataFrame) -> Table:
    """How many claims got which verdict, one line per source and routing, for the terminal: at most 80 columns wide.

    Args:
        verdicts: as :func:`to_frame` makes them.
    """
    table = Table(
        title="Verdicts on the published numbers",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for verdict in VERDICTS:
        table.add_column(verdict.replace(" ", "\n"), justify="right", style=STYLES[verdict], no_wrap=True)
    last = ""
    for (source, routing), group in verdicts.groupby(["source", "routing"], sort=False):
        if source != last:
            table.add_row(Text("no run" if source == NONE else str(source), style="bold"))
        last, count = source, Counter(group["verdict"])
        table.add_row(f"  {routing_words(str(routing))}", *(str(count[verdict]) for verdict in VERDICTS))
    return table
