"""Claims and numbers as a reader of the report sees them."""

import math
from collections.abc import Mapping, Sequence

from hiermoe.analysis.claims import BEST_OF, Claim
from hiermoe.analysis.frames import Results
from hiermoe.analysis.statistics import Estimate
from hiermoe.analysis.verdicts import Judged
from hiermoe.model import ModelConfig
from hiermoe.records.keep import NONE

METRICS = {
    "duplication_rate": "duplication rate",
    "a2a_speedup": "AlltoAll speed-up",
    "a2a_order": "AlltoAll speed-up",
    "a2a_cv_order": "variation of AlltoAll time",
    "e2e_speedup": "speed-up of the step",
    "e2e_order": "speed-up of the step",
    "fit_r2": "r² of the fit",
    "alpha_ms;beta_ms_per_byte": "α in ms; β in ms/B",
    "swap_share_of_step": "a swap's share of the step",
    "a2a_share_of_step": "AlltoAll's share of the step",
    "fit_time_ms": "time of the fit, ms",
    "calibration_time_s": "time of the calibration, s",
    "imbalance_of_routing": "busiest GPU's expert rows over the mean, nothing balanced",
    "imbalance": "busiest GPU's expert rows over the mean",
    "imbalance_order": "busiest GPU's expert rows over the mean",
    "copies": "copies of experts in a micro-batch",
    "leaving": "rows that leave their GPU",
    "leaving_order": "rows that leave their GPU",
}
GLYPHS = {
    "reproduced": "✔",
    "same direction": "≈",
    "contradicted": "✘",
    "by construction": "◇",
    "not testable": "–",
}


def system_labels(results: Results) -> dict[str, str]:
    """Label of every system that some run has."""
    return {run.system: run.label for runs in results.runs.values() for run in runs}


def in_words(claim: Claim, labels: Mapping[str, str]) -> str:
    """A claim as a phrase, e.g. ``AlltoAll speed-up, HierMoE over Megatron-LM, DeepSeek-V3``."""

    def named(side: str) -> str:
        best, names = BEST_OF if side.startswith(BEST_OF) else "", side.removeprefix(BEST_OF).split()
        return best + (", ".join(labels[name] for name in names) if labels.keys() >= set(names) else side)

    who = f"{named(claim.system)} over {named(claim.baseline)}" if claim.baseline else named(claim.system)
    return ", ".join(filter(None, [METRICS[claim.metric], who, _model(claim.model), claim.condition]))


def _model(name: str) -> str:
    """For readers; empty where no model, or no single one, is meant."""
    return "" if name in ("", "both", NONE) else ModelConfig.named(name).label


def number(value: float) -> str:
    """Three significant digits; empty for NaN."""
    if math.isnan(value):
        return ""
    if abs(value) < 1e-3 or abs(value) >= 100:
        return f"{value:.3g}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"


def with_interval(estimate: Estimate) -> str:
    """``1.62 [1.61, 1.63]``, with as many digits as tell the ends from the value."""
    if math.isnan(estimate.value):
        return number(estimate.low) and f"{number(estimate.low)}; {number(estimate.high)}"
    digits = 3 if abs(estimate.value - 1) < 0.05 or abs(estimate.value) < 0.1 else 2
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def cell(judged: Sequence[Judged]) -> str:
    """All cases of a claim on one routing, in one table cell."""
    keys = [(_model(one.case.model), one.case.baseline, one.case.condition) if one.case else () for one in judged]
    told_apart = [len(set(values)) > 1 for values in zip(*keys, strict=False)]
    parts = []
    for one, key in zip(judged, keys, strict=True):
        which = ", ".join(value for value, differs in zip(key, told_apart, strict=False) if differs and value)
        mark = f"{GLYPHS[one.verdict]} {one.verdict}"
        parts.append(" ".join(filter(None, [f"{which}:" if which else "", with_interval(one.estimate), mark])))
    return "<br>".join(parts) or "–"
