"""From a claim to the runs that answer it: one case per source, routing, model and whatever else the sweep varies."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hiermoe.analysis.claims import BEST_OF, Claim, Rules
from hiermoe.analysis.frames import Results, Run
from hiermoe.records.index import REAL_MODELS, RECORDED, over

GROUPED_BY = ("source", "routing", "model", "cluster")
SETTINGS = ("measure", "ranks", "iterations", "tokens_per_rank", "narrowed")  # of how, not of what, is measured


@dataclass(frozen=True)
class Case:
    """Runs that differ in nothing but their system.

    Attributes:
        claim: what is judged.
        sweep: whose runs answer it.
        source: how the numbers came to be.
        routing: whose tokens.
        model: name.
        baseline: one of the claim's baselines; empty where the claim has none.
        condition: what the sweep varies beyond that, e.g. ``gamma 7``.
        place: where in a model and its training the routing was recorded, e.g. ``late, MoE layer 2``.
        systems: runs of the claim's system; several for ``best of``; all runs where the claim has neither system of
            ours nor baseline (Table II, Fig. 9).
        baselines: runs of the baseline; several for ``best of``.
    """

    claim: Claim
    sweep: str
    source: str
    routing: str
    model: str
    baseline: str
    condition: str
    place: str
    systems: tuple[Run, ...]
    baselines: tuple[Run, ...]

    @property
    def obstacle(self) -> str:
        """Why there is no number; empty where there is one."""
        for side, runs in ((self.claim.system, self.systems), (self.baseline, self.baselines)):
            if not runs and side:
                return f"no run of {side} in the sweep"
            lacking = [run for run in runs if run.status in ("missing", "failed")]
            if lacking:
                return f"{lacking[0].status}: {lacking[0].reason}"
            if runs and all(run.status == "not_applicable" for run in runs):
                return runs[0].reason
        return ""

    @property
    def has_derived_constants(self) -> bool:
        """Whether a constant of the cluster is a reading."""
        return any(run.has_derived_constants for run in self.systems)


def cases(claim: Claim, rules: Rules, results: Results) -> Iterator[Case]:
    """All cases of a claim, in the order of its sweep; then those of other places, and on real models of any model."""
    sweep, base = claim.sweep(rules), rules.baseline_sweep
    yield from _cases(claim, sweep, base, claim.wanted, results)
    yield from _cases(claim, over(sweep, RECORDED), over(base, RECORDED), claim.wanted, results)
    wanted = {key: value for key, value in claim.wanted.items() if key != "model"}
    yield from _cases(claim, over(sweep, REAL_MODELS), over(base, REAL_MODELS), wanted, results)


def _cases(claim: Claim, sweep: str, baseline_sweep: str, wanted: dict[str, Any], results: Results) -> Iterator[Case]:
    groups: dict[tuple, list[Run]] = {}
    apart = (*GROUPED_BY, "system", *SETTINGS, "layer", "stage")  # which are a place
    for run in results.find(sweep, **wanted):
        varied = {key: value for key, value in run.swept.items() if key not in apart}
        key = (*(run.value(name) for name in GROUPED_BY), run.place, *varied.items())
        groups.setdefault(key, []).append(run)
    clusters = {(source, cluster) for source, _, _, cluster, *_ in groups}
    for (source, routing, model, cluster, place, *varied), runs in groups.items():
        details = [f"{name} {value}" for name, value in varied if name not in claim.wanted]
        several = sum(of == source for of, _ in clusters) > 1
        for baseline in claim.baselines:
            alike = results.find(baseline_sweep, source=source, routing=routing, model=model, cluster=cluster)
            others = [run for run in alike if run.place == place]
            yield Case(
                claim=claim,
                sweep=sweep,
                source=source,
                routing=routing,
                model=model,
                baseline=baseline,
                condition=", ".join([cluster, *details] if several else details),
                place=place,
                systems=_of(claim.system, runs) or (() if baseline else tuple(runs)),
                baselines=_of(baseline, runs) or _of(baseline, others),
            )


def _of(side: str, runs: list[Run]) -> tuple[Run, ...]:
    """Runs of the system, or of all systems of ``best of``."""
    names = side.removeprefix(BEST_OF).split()
    return tuple(run for run in runs if run.system in names)
