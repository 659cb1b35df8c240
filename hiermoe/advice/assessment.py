"""The numbers of a case: what every system takes on held-out iterations, and what placement adds update by update."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pandas as pd

from hiermoe.advice.held_out import HeldOut, count_held_out
from hiermoe.advice.inputs import Case
from hiermoe.advice.systems import BASELINE, Candidate
from hiermoe.analysis.statistics import Estimate, ratio_of_sums
from hiermoe.backends.simulated import simulate
from hiermoe.backends.workload import Workload
from hiermoe.planner.cost import ALLTOALLS_PER_STEP
from hiermoe.routing.step import first_measured, iteration_schedule
from hiermoe.topology.placement import Placement

FEWEST_FOR_INTERVALS = 8  # held-out iterations; a bootstrap of fewer says little


@dataclass(frozen=True)
class Assessed:
    """A system on the case's held-out iterations.

    Attributes:
        candidate: the system.
        steps: its step rows of the simulation, held-out iterations, in which it goes on updating.
        stages: of the same, mean ms of each stage in the four AlltoAlls of a step: float64 by stage name.
        speedup: AlltoAll time of the flat AlltoAll over its own.
        frozen: its traffic under the last placement that it had before the held-out iterations.
        moved_ms: migration until then, full state at the link's rate.
        updates: for a system that moves experts, one row per number of updates (see `_updates`); else empty.
    """

    candidate: Candidate
    steps: pd.DataFrame
    stages: pd.Series
    speedup: Estimate
    frozen: HeldOut
    moved_ms: float
    updates: pd.DataFrame

    @property
    def migration_ms(self) -> float:
        """Of a held-out step, mean."""
        return float(self.steps["migration_link_ms"].mean())

    @property
    def dimensions(self) -> dict[int, float]:
        """Share of held-out iterations in which each dimension was used: d*, where it is chosen."""
        return self.steps["dimension"].astype(int).value_counts(normalize=True).to_dict()


@dataclass(frozen=True)
class Assessment:
    """All numbers of a case.

    Attributes:
        case: what was asked.
        systems: the flat AlltoAll first.
        levels: one row per level, outermost first (see `_levels`).
        num_held_out: iterations that count.
        left_out: label of each system that does not apply, and why.
    """

    case: Case
    systems: tuple[Assessed, ...]
    levels: pd.DataFrame
    num_held_out: int
    left_out: tuple[tuple[str, str], ...]

    @property
    def flat(self) -> Assessed:
        """The flat AlltoAll."""
        return self.systems[0]

    @property
    def has_intervals(self) -> bool:
        """Whether there are enough held-out iterations for intervals to mean something."""
        return self.num_held_out >= FEWEST_FOR_INTERVALS

    def named(self, name: str) -> Assessed:
        """The system of this name."""
        return next(one for one in self.systems if one.candidate.name == name)


def assess(
    case: Case,
    systems: Sequence[Candidate],
    left_out: Sequence[tuple[str, str]] = (),
    progress: Callable[[str, int], None] = lambda label, iteration: None,
) -> Assessment:
    """Walk every system through the case.

    Args:
        case: what is asked.
        systems: the flat AlltoAll first.
        left_out: of systems that do not apply, to be told.
        progress: called with a label and the number of an iteration that is done.
    """
    assert systems[0].name == BASELINE
    measured_from = first_measured(case.iterations, case.routing.num_distinct)
    held_out = iteration_schedule(case.iterations, case.routing.num_distinct)[measured_from:]
    assessed: list[Assessed] = []
    for candidate in systems:
        rows = simulate(_workload(case, candidate), lambda i, label=candidate.label: progress(label, i))
        every_step = rows[rows["phase"] == "step"]
        steps = every_step[every_step["measured"]].reset_index(drop=True)
        stages = rows[rows["measured"] & (rows["phase"] == "dispatch")]
        flat_ms = (assessed[0].steps if assessed else steps)["predicted_ms"].to_numpy(float)
        before = every_step[~every_step["measured"]]
        updates = _updates(case, candidate, before, held_out) if candidate.moves else pd.DataFrame()
        assessed.append(
            Assessed(
                candidate=candidate,
                steps=steps,
                stages=ALLTOALLS_PER_STEP * stages.groupby("stage")["predicted_ms"].sum() / len(steps),
                speedup=ratio_of_sums(flat_ms, steps["predicted_ms"].to_numpy(float)),
                frozen=_count(case, candidate, _placements(case, before)[-1], held_out),
                moved_ms=float(before["migration_link_ms"].sum()),
                updates=updates,
            )
        )
    return Assessment(case, tuple(assessed), _levels(case, assessed[0], held_out), len(held_out), tuple(left_out))


def _workload(case: Case, candidate: Candidate) -> Workload:
    return Workload(
        system=candidate.system,
        schemes=candidate.schemes,
        new_policy=candidate.system.build_policy,
        cluster=case.cluster,
        routing=case.routing,
        layer=case.layer,
        num_experts=case.num_experts,
        topk=case.topk,
        row_bytes=case.row_bytes,
        element_bytes=case.element_bytes,
        expert_parameters=case.expert_parameters,
        iterations=case.iterations,
    )


def _count(case: Case, candidate: Candidate, placement: Placement, iterations: Sequence[int]) -> HeldOut:
    counts = [case.routing.counts(i, placement, case.cluster.hierarchy) for i in iterations]
    return count_held_out(candidate.schemes, counts, case.cluster.hierarchy, case.row_bytes)


def _placements(case: Case, steps: pd.DataFrame) -> list[Placement]:
    """After 0, 1, 2, ... updates."""
    moves = steps["moves"].dropna() if "moves" in steps else pd.Series(dtype=str)
    return list(accumulate(moves[moves != ""], Placement.after, initial=Placement.identity(case.num_experts)))


def _updates(case: Case, candidate: Candidate, before: pd.DataFrame, held_out: Sequence[int]) -> pd.DataFrame:
    """What updates before the held-out iterations bring there, if the placement then stays as it is.

    Columns:
        updates: number of updates, 0 and rising.
        step: training step after which the last of them came; 0 for none.
        moved_experts: in all of them, a move back and forth counted twice.
        step_ms: AlltoAll time of a held-out step.
        value, low, high: AlltoAll time with fixed experts under the same schemes over it, with its interval.
        moved_ms: migration of all of them, full state at the link's rate.
        break_even_steps: until the time saved makes up for it; infinite where nothing is saved.
    """
    placements = _placements(case, before)
    acting = before[before["moved_experts"] > 0]
    last = len(placements) - 1
    fixed_ms = _count(case, candidate, placements[0], held_out).step_ms(case.cluster)
    rows = []
    for updates in sorted({*(2**n for n in range(20) if 2**n < last), 0, last}):
        so_far = acting.iloc[:updates]
        own_ms = _count(case, candidate, placements[updates], held_out).step_ms(case.cluster)
        gain, moved_ms = ratio_of_sums(fixed_ms, own_ms), float(so_far["migration_link_ms"].sum())
        saved_ms = float((fixed_ms - own_ms).mean())
        rows.append(
            {
                "system": candidate.name, "label": candidate.label, "updates": updates,
                "step": int(so_far["iteration"].iloc[-1]) + 1 if updates else 0,
                "moved_experts": int(so_far["moved_experts"].sum()), "step_ms": float(own_ms.mean()),
                "value": gain.value, "low": gain.low, "high": gain.high, "moved_ms": moved_ms,
                "break_even_steps": break_even_steps(moved_ms, saved_ms),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def break_even_steps(moved_ms: float, saved_ms: float) -> float:
    """Steps until what is saved in each makes up for a migration; infinite where nothing is saved."""
    if moved_ms == 0:
        return 0.0
    return moved_ms / saved_ms if saved_ms > 0 else math.inf


def _levels(case: Case, flat: Assessed, held_out: Sequence[int]) -> pd.DataFrame:
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
    counts = [case.routing.counts(i, Placement.identity(case.num_experts), hierarchy) for i in held_out]
    pairs = float(np.mean([int(x.pairs_GE.sum()) for x in counts]))
    rows = []
    for level, (name, groups) in enumerate(zip(hierarchy.names, hierarchy.groups, strict=True), start=1):
        distinct = float(np.mean([int(x.tokens[level - 1].sum()) for x in counts]))
        size, topk = case.num_experts // groups, case.topk
        missed = math.comb(case.num_experts - size, topk) / math.comb(case.num_experts, topk)
        rows.append(
            {
                "level": level, "name": name, "groups": groups, "pairs": pairs, "distinct": distinct,
                "duplication": 1 - distinct / pairs, "independent": 1 - groups * (1 - missed) / topk,
                "lowest": 1 - min(groups, topk) / topk, "highest": 1 - math.ceil(topk / size) / topk,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)
