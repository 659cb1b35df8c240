"""The numbers of a case: what every system takes on held-out iterations, and what placement adds update by update."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import pandas as pd
import torch

from hiermoe.advice.case import Case
from hiermoe.advice.held_out import HeldOut, HeldOutLayers, count_held_out
from hiermoe.advice.systems import BASELINE, Candidate
from hiermoe.advice.with_copies import Progress, assess_copies
from hiermoe.analysis.statistics import Estimate, ratio_of_sums
from hiermoe.analysis.whole_step import step_speedup, whole_step_ms
from hiermoe.measure.predict import simulate
from hiermoe.measure.workload import CachedRouting, Workload
from hiermoe.routing.collapse import collapse
from hiermoe.routing.step import RoutingStep
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.placement import Placement

FEWEST_FOR_INTERVALS = 8  # held-out iterations; a bootstrap of fewer says little


@dataclass(frozen=True)
class Assessed:
    """A system on the case's held-out iterations.

    Attributes:
        candidate: the system.
        held_out: its traffic there, experts where its last update before them left them.
        fixed: the same if no expert had moved.
        placements: where experts are in the end, by layer.
        speedup: AlltoAll time of the flat AlltoAll over its own, without migration.
        updates: for a system that may move experts, one row per number of updates (see `_updates`); else empty.
    """

    candidate: Candidate
    held_out: HeldOut | HeldOutLayers
    fixed: HeldOut | HeldOutLayers
    placements: Mapping[int, Placement]
    speedup: Estimate
    updates: pd.DataFrame

    @property
    def moved_ms(self) -> float:
        """Migration of all updates before the held-out iterations, full state at the link's rate."""
        return float(self.updates["moved_ms"].iloc[-1]) if len(self.updates) else 0.0


@dataclass(frozen=True)
class Assessment:
    """All numbers of a case.

    Attributes:
        case: what was asked.
        systems: the flat AlltoAll first.
        levels: one row per level, outermost first (see `_levels`).
        num_seen: iterations that placement policies decided from, repeats included.
        num_held_out: iterations that count.
        left_out: label of each system that does not apply, and why.
        collapsed: how routing has collapsed (see `hiermoe.routing.collapse`); None where it has not.
        layers: of the whole model, the same for each layer; empty for one layer.
        copies: systems with copies of experts beside some without (see `assess_copies`); empty where not asked for.
    """

    case: Case
    systems: tuple[Assessed, ...]
    levels: pd.DataFrame
    num_seen: int
    num_held_out: int
    left_out: tuple[tuple[str, str], ...]
    collapsed: str | None
    layers: tuple["Assessment", ...] = ()
    copies: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def flat(self) -> Assessed:
        """The flat AlltoAll."""
        return self.systems[0]

    @property
    def has_intervals(self) -> bool:
        """Whether there are enough held-out iterations for intervals to mean something."""
        return self.num_held_out >= FEWEST_FOR_INTERVALS

    def parts_ms(
        self, one: Assessed, cluster: Cluster, share_of_bytes: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Computation and AlltoAlls of a system's held-out steps: float64 [iteration] each; None without a profile."""
        compute = self.case.compute
        if compute is None:
            return None
        compute_ms = one.held_out.compute_ms(compute, self.case.tokens_per_rank, share_of_bytes)
        return compute_ms, one.held_out.step_ms(cluster, share_of_bytes)

    def share(self, cluster: Cluster, share_of_bytes: float = 1.0) -> float | None:
        """Of what is seen of the AlltoAlls in the step under the flat one: as stated or computed; None: neither.

        Args:
            cluster: constants.
            share_of_bytes: as if there were only so many tokens.
        """
        compute, parts = self.case.compute, self.parts_ms(self.flat, cluster, share_of_bytes)
        if compute is None or parts is None:
            return self.case.share
        return float(1 - parts[0].sum() / whole_step_ms(*parts, compute.hidden).sum())

    def whole_ms(self, one: Assessed, cluster: Cluster, share_of_bytes: float = 1.0) -> float | None:
        """A system's held-out steps with their computation, mean; None without a profile."""
        compute, parts = self.case.compute, self.parts_ms(one, cluster, share_of_bytes)
        return None if compute is None or parts is None else float(whole_step_ms(*parts, compute.hidden).mean())

    def step_speedup(self, one: Assessed, communication: float) -> float | None:
        """Of the user's whole step under a system; None where neither share nor profile is known.

        With a profile the busiest GPU's computation under the system's placement counts too.

        Args:
            one: the system.
            communication: its AlltoAll and migration over the flat AlltoAll.
        """
        cluster, compute = self.case.cluster, self.case.compute
        flat, own = self.parts_ms(self.flat, cluster), self.parts_ms(one, cluster)
        if compute is None or flat is None or own is None:
            return None if self.case.share is None else float(step_speedup(self.case.share, communication))
        migration_ms = communication * flat[1].mean() - own[1].mean()
        own_ms = whole_step_ms(*own, compute.hidden).mean() + migration_ms
        return float(whole_step_ms(*flat, compute.hidden).mean() / own_ms)

    def named(self, name: str) -> Assessed:
        """The system of this name."""
        return next(one for one in self.systems if one.candidate.name == name)


@dataclass(frozen=True)
class _Seen:
    """The iterations that policies may decide from, in the order of the run."""

    routing: CachedRouting
    schedule: Sequence[int]
    num_distinct: None = None

    def step(self, iteration: int) -> RoutingStep:
        return self.routing.step(self.schedule[iteration])


def assess(
    case: Case,
    systems: Sequence[Candidate],
    left_out: Sequence[tuple[str, str]] = (),
    progress: Progress = lambda label, iteration: None,
    with_copies: Sequence[Candidate] = (),
) -> Assessment:
    """Let every policy decide on the first iterations, and price every system on the others.

    Args:
        case: what is asked.
        systems: the flat AlltoAll first.
        left_out: of systems that do not apply, to be told.
        progress: called with a label and the number of an iteration that is done.
        with_copies: systems of the table of copies.
    """
    assert systems[0].name == BASELINE
    schedule, held_out = case.schedules
    seen = CachedRouting(_Seen(case.routing, schedule))
    assessed: list[Assessed] = []
    for candidate in systems:
        label, system = candidate.label, candidate.system
        fixed = count_held_out(case, candidate.schemes, case.first_places, held_out)
        counted, placement, updates = fixed, case.first_places, pd.DataFrame()
        if candidate.moves:
            workload = Workload(
                system,
                candidate.schemes,
                system.build_policy,
                case.cluster,
                seen,
                case.layer,
                case.sizes,
                len(schedule),
            )
            run = simulate(workload, lambda iteration, label=label: progress(label, iteration))
            counted, placement, updates = _after_updates(case, candidate, run, fixed, held_out)
        flat = assessed[0].held_out if assessed else counted
        speedup = ratio_of_sums(flat.step_ms(case.cluster), counted.step_ms(case.cluster))
        assessed.append(Assessed(candidate, counted, fixed, {case.layer: placement}, speedup, updates))
        progress(label, len(schedule) - 1)
    chosen = [case.judging.step(i).expert_ids_NK.flatten() for i in held_out]
    collapsed = collapse(torch.bincount(torch.cat(chosen), minlength=case.sizes.num_experts).numpy())
    levels = _levels(case, held_out)
    copies = assess_copies(case, with_copies, progress)
    return Assessment(
        case, tuple(assessed), levels, len(schedule), len(held_out), tuple(left_out), collapsed, copies=copies
    )


def _after_updates(
    case: Case, candidate: Candidate, run: pd.DataFrame, fixed: HeldOut, held_out: Sequence[int]
) -> tuple[HeldOut, Placement, pd.DataFrame]:
    """What updates bring on held-out iterations, if the placement then stays as it is; ``fixed`` is after none.

    Returns:
        The traffic after all updates, where experts are then, and a table.

    Columns:
        system, label: of the system.
        updates: number of updates, 0 and rising.
        step: training steps until the last of them; 0 for none.
        moved_experts: in all of them, a move back and forth counted twice.
        step_ms: AlltoAll time of a held-out step.
        value, low, high: AlltoAll time with fixed experts under the same schemes over it, with its interval.
        moved_ms: migration of all of them, full state at the link's rate.
        break_even_steps: until the time saved makes up for it; infinite where nothing is saved.
    """
    acting = run[run["moves"].fillna("") != ""] if "moves" in run else run.assign(moves="").iloc[:0]
    placements = list(accumulate(acting["moves"], Placement.after, initial=case.first_places))
    last, own = len(acting), fixed
    fixed_ms = fixed.step_ms(case.cluster)
    rows = []
    for updates in sorted({*(2**n for n in range(20) if 2**n < last), 0, last}):
        so_far = acting.iloc[:updates]
        if updates:
            own = count_held_out(case, candidate.schemes, placements[updates], held_out)
        moved = {
            "updates": updates,
            "step": int(so_far["iteration"].iloc[-1]) + 1 if updates else 0,
            "moved_experts": int(so_far["moved_experts"].sum()),
        }
        own_ms, moved_ms = own.step_ms(case.cluster), float(so_far["migration_link_ms"].sum())
        rows.append(update_row(candidate, moved, fixed_ms, own_ms, moved_ms))
    return own, placements[-1], pd.DataFrame(rows)


def update_row(
    candidate: Candidate, moved: Mapping[str, int], fixed_ms: np.ndarray, own_ms: np.ndarray, moved_ms: float
) -> dict[str, object]:
    """A row of the table of updates.

    Args:
        candidate: the system.
        moved: entries ``updates``, ``step`` and ``moved_experts``.
        fixed_ms: AlltoAll time of every held-out step before the first update: float64 [iteration].
        own_ms: the same after these.
        moved_ms: migration of all of these.
    """
    gain = ratio_of_sums(fixed_ms, own_ms)
    return {
        "system": candidate.name,
        "label": candidate.label,
        **moved,
        "step_ms": float(own_ms.mean()),
        "value": gain.value,
        "low": gain.low,
        "high": gain.high,
        "moved_ms": moved_ms,
        "break_even_steps": break_even_steps(moved_ms, float((fixed_ms - own_ms).mean())),
    }


def break_even_steps(moved_ms: float, saved_ms: float) -> float:
    """Steps until what is saved in each makes up for a migration; infinite where nothing is saved."""
    if moved_ms == 0:
        return 0.0
    return moved_ms / saved_ms if saved_ms > 0 else math.inf


def _levels(case: Case, held_out: Sequence[int]) -> pd.DataFrame:
    """What routing asks of every level with experts in their first places.

    Columns:
        level: 1 is outermost.
        name: of a group.
        groups: U[level].
        pairs, distinct: token-expert pairs and distinct (token, group) pairs of a step, mean.
        duplication: 1 - distinct / pairs.
        independent: the same if every token drew K experts at random.
        lowest, highest: the same for the worst and best routing that there can be.
    """
    hierarchy = case.cluster.hierarchy
    counts = [case.judging.counts(i, case.first_places, hierarchy) for i in held_out]
    pairs = float(np.mean([int(x.pairs_GS.sum()) for x in counts]))
    rows = []
    for level, (name, groups) in enumerate(zip(hierarchy.names, hierarchy.groups, strict=True), start=1):
        distinct = float(np.mean([int(x.tokens[level - 1].sum()) for x in counts]))
        experts, topk = case.sizes.num_experts, case.sizes.topk
        held = (case.first_places.expert_at_S.view(groups, -1) < experts).sum(1).tolist()  # of each group
        reached = sum(1 - math.comb(experts - size, topk) / math.comb(experts, topk) for size in held)
        rows.append(
            {
                "level": level,
                "name": name,
                "groups": groups,
                "pairs": pairs,
                "distinct": distinct,
                "duplication": 1 - distinct / pairs,
                "independent": 1 - reached / topk,
                "lowest": 1 - min(groups, topk) / topk,
                "highest": 1 - math.ceil(topk / max(held)) / topk,
            }
        )
    return pd.DataFrame(rows)
