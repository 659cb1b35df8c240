"""From runs to the number that a claim is about: one function per metric."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from hiermoe.analysis.cases import Case
from hiermoe.analysis.claims import BEST_OF
from hiermoe.analysis.frames import Results, Run
from hiermoe.analysis.statistics import Estimate, bootstrap, paired, ratio_of_medians, ratio_of_sums, ratio_of_variation
from hiermoe.analysis.whole_step import FULL_STATE_AT_LINK, PUBLISHED_SHARES, migration_prices, migration_share
from hiermoe.planner.fit import Fit, fit_alpha_beta
from hiermoe.topology.peers import Peers


@dataclass(frozen=True)
class Quantity:
    """A number of ours, and what else a reader must know about it."""

    estimate: Estimate
    note: str = ""


def speedup(system: Run, baseline: Run, results: Results) -> Estimate:
    """Time of the baseline's four AlltoAlls over the system's, over the measured iterations.

    Predicted times are summed (reading 4); of measured ones, which have outliers, the medians are compared.
    """
    ours, theirs = (results.rows(run, "step") for run in (system, baseline))
    system_ms, baseline_ms = paired(ours, theirs, "step_ms")
    return (ratio_of_sums if system.source == "simulated" else ratio_of_medians)(baseline_ms, system_ms)


def duplication_rate(run: Run, groups: int, results: Results) -> Estimate:
    """1 - distinct (token, group) pairs / token-expert pairs, over the measured iterations."""
    level = run.config.cluster.hierarchy.groups.index(groups) + 1
    rows = results.rows(run, "routing")
    rows = rows[rows["dimension"] == level]
    return bootstrap(
        lambda distinct, pairs: 1 - distinct.sum(-1) / pairs.sum(-1),
        rows["rows"].to_numpy(float),
        rows["pairs"].to_numpy(float),
    )


def fits(run: Run, results: Results) -> dict[Peers, Fit]:
    """A line through the timings of each AlltoAll of the run's cluster."""
    rows = results.rows(run, "calibration")
    found = {}
    for stage, timings in rows.groupby("stage", sort=False):
        found[str(stage)] = fit_alpha_beta(timings["bytes"].to_numpy(float), timings["predicted_ms"].to_numpy(float))
    return {peers: found[str(peers)] for peers in run.config.cluster.exchanges if str(peers) in found}


def fastest(runs: Sequence[Run], results: Results) -> Run:
    """The run with the least AlltoAll time among those that apply."""
    return min(
        (run for run in runs if run.status == "ok"),
        key=lambda run: results.rows(run, "step")["step_ms"].sum(),
    )


def _pair(case: Case, results: Results) -> tuple[Run, Run, str]:
    """System and baseline of the case, the fastest where it says ``best of``, and a note on which that was."""
    system, baseline = fastest(case.systems, results), fastest(case.baselines, results)
    sides = ((case.claim.system, system), (case.baseline, baseline))
    chosen = [f"{side} is {run.system}" for side, run in sides if side.startswith(BEST_OF)]
    return system, baseline, "; ".join(chosen)


def _speedup(case: Case, results: Results) -> Quantity:
    system, baseline, note = _pair(case, results)
    return Quantity(speedup(system, baseline, results), note)


def _variation(case: Case, results: Results) -> Quantity:
    system, baseline, note = _pair(case, results)
    ours, theirs = paired(results.rows(system, "step"), results.rows(baseline, "step"), "step_ms")
    spread = f"standard deviation {ours.std():.3g} ms against {theirs.std():.3g} ms"
    return Quantity(ratio_of_variation(ours, theirs), "; ".join(filter(None, [note, spread])))


def _step_order(case: Case, results: Results) -> Quantity:
    """Speed-up of AlltoAll and migration together; compute is the same for both."""
    system, baseline, _ = _pair(case, results)
    ours, theirs = results.rows(system, "step"), results.rows(baseline, "step")
    alltoall = speedup(system, baseline, results)
    total = ratio_of_sums(*(rows["step_ms"].to_numpy() + FULL_STATE_AT_LINK.of(rows) for rows in (theirs, ours)))
    return Quantity(total, f"AlltoAll alone {alltoall.value:.3f}, the rest is migration")


def _duplication(case: Case, results: Results) -> Quantity:
    groups = int(case.claim.condition.split()[0].removeprefix("groups="))
    return Quantity(duplication_rate(case.systems[0], groups, results))


def _worst_fit(case: Case, results: Results) -> Quantity:
    r2 = [fit.r2 for fit in fits(case.systems[0], results).values()]
    return Quantity(Estimate(min(r2), min(r2), max(r2), len(r2)), "range over the AlltoAlls")


def _constants(case: Case, results: Results) -> Quantity:
    """Like published.csv: alpha as the low end, beta as the high end."""
    wanted = case.claim.system.replace("inter-level-", "inter").replace("intra-level-", "intra")
    name = "world" if wanted.startswith("standard") else wanted
    fit = next(fit for peers, fit in fits(case.systems[0], results).items() if str(peers) == name)
    n = int((results.rows(case.systems[0], "calibration")["stage"] == name).sum())
    return Quantity(
        Estimate(float("nan"), fit.alpha_ms, fit.beta_ms_per_byte, n), "low = alpha_ms, high = beta_ms_per_byte"
    )


def _swap_share(case: Case, results: Results) -> Quantity:
    """Range over what may move, at which rate, and AlltoAll's share of the step; the value is full state at the "
    "link's rate."""
    run = case.systems[0]
    alike = results.find(case.sweep, system="megatron", source=case.source, routing=case.routing, model=case.model)
    (megatron,) = (other for other in alike if other.place == run.place)
    rows, reference = results.rows(run, "step"), results.rows(megatron, "step")
    share = partial(migration_share, rows, reference)
    shares = {p.label: [share(p, s) for s in PUBLISHED_SHARES] for p in migration_prices()}
    swaps = float((rows["moved_experts"] > 0).mean())
    every = [value for values in shares.values() for value in values]
    middle = float(np.mean(shares[FULL_STATE_AT_LINK.label]))
    detail = "; ".join(f"{label} {low:.1%} to {high:.1%}" for label, (low, high) in shares.items())
    return Quantity(
        Estimate(middle, min(every), max(every), len(rows)), f"{detail}; {swaps:.0%} of measured steps end with a swap"
    )


def imbalance(run: Run, results: Results) -> Estimate:
    """Expert rows of the busiest GPU over the mean of all, mean over the measured iterations."""
    steps = results.rows(run, "step")
    return bootstrap(lambda skew: skew.mean(-1), (steps["expert_rows_max"] / steps["expert_rows_mean"]).to_numpy(float))


def copies(run: Run, results: Results) -> Estimate:
    """Copies of experts that get weights in a micro-batch, all GPUs together, mean over the measured iterations.

    Each sends its gradient home once: they are counted by these bytes.
    """
    terms = run.config.system.build_policy().copies
    each = terms.gradient_bytes * run.config.sizes.expert_parameters
    sent = results.rows(run, "step")["gradient_bytes"].to_numpy(float)
    return bootstrap(lambda total: total.mean(-1) / each, sent)


def _imbalance(case: Case, results: Results) -> Quantity:
    return Quantity(imbalance(case.systems[0], results))


def _imbalance_order(case: Case, results: Results) -> Quantity:
    """Imbalance of the system over that of the baseline."""
    system, baseline, _ = _pair(case, results)
    rows = (results.rows(run, "step") for run in (system, baseline))
    mine, others = (steps.assign(skew=steps["expert_rows_max"] / steps["expert_rows_mean"]) for steps in rows)
    ours, theirs = paired(mine, others, "skew")
    return Quantity(ratio_of_sums(ours, theirs), f"{ours.mean():.2f} against {theirs.mean():.2f}")


def _copies(case: Case, results: Results) -> Quantity:
    return Quantity(copies(case.systems[0], results))


def _leaving(case: Case, results: Results) -> Quantity:
    """Rows that leave their GPU in dispatch, of the system over those of the baseline."""
    system, baseline, _ = _pair(case, results)
    left = [
        results.rows(run, "dispatch").groupby("iteration")["crossing_rows"].sum().to_numpy(float)
        for run in (system, baseline)
    ]
    return Quantity(ratio_of_sums(*left))


METRICS: dict[str, Callable[[Case, Results], Quantity]] = {
    "duplication_rate": _duplication,
    "a2a_speedup": _speedup,
    "a2a_order": _speedup,
    "a2a_cv_order": _variation,
    "e2e_order": _step_order,
    "fit_r2": _worst_fit,
    "alpha_ms;beta_ms_per_byte": _constants,
    "swap_share_of_step": _swap_share,
    "imbalance_of_routing": _imbalance,
    "imbalance": _imbalance,
    "imbalance_order": _imbalance_order,
    "copies": _copies,
    "leaving": _leaving,
    "leaving_order": _leaving,
}
