"""One of four answers, by a ladder of rules with named thresholds.

1. The fastest system, migration spread over `HORIZON_STEPS`, saves less than `STAY_BELOW_GAIN`, or (where the user says
   what share of the step AlltoAll takes) the step gains less than `STAY_BELOW_STEP_GAIN`: **stay** with the flat one.
2. The gain is below what the model resolves (`RESOLUTION`), or its interval does not exclude 1: **unresolved**.
3. Some system that leaves experts alone passes 1 and 2 and takes at most `PLACEMENT_PAYS_FROM` longer than the fastest,
   or (where a step's computation is known) no system of rule 4 has a shorter whole step than it: **dispatch**. Of such
   systems within `TIE` of their fastest, the one with the fewest stages.
4. Else: **placement**: of the systems within `TIE` of the fastest, the one that spends the least on moving experts.

Systems that may drop tokens are never recommended.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hiermoe.advice.assessment import FEWEST_FOR_INTERVALS, Assessed
from hiermoe.analysis.statistics import Estimate, ratio_of_sums
from hiermoe.analysis.whole_step import step_speedup
from hiermoe.planner.fit import CALIBRATED
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import AlphaBeta

Outcome = Literal["stay", "unresolved", "dispatch", "placement"]
Constants = Literal["calibrated", "published", "data sheet", "derived"]

STAY_BELOW_GAIN = 0.05  # of AlltoAll time; less does not pay for another dispatcher in a training stack
STAY_BELOW_STEP_GAIN = 0.01  # of the step, where AlltoAll's share of it is known
# Least predicted gain that is told from none: a judgement. Where prediction and measurement are both known (emulated
# clusters with constants of that very network) speed-ups were as predicted within 6 % with a core for every two ranks,
# and up to a quarter smaller where 32 ranks shared two: 15 % predicted leaves something in either case. Constants of a
# cluster that is not the user's, or that nobody measured, are less certain still.
RESOLUTION: dict[Constants, float] = {"calibrated": 0.15, "published": 0.25, "data sheet": 0.35, "derived": 0.35}
PLACEMENT_PAYS_FROM = 0.05  # of AlltoAll time; moving experts touches optimizer state and checkpoints
TIE = 0.02  # of AlltoAll time
HORIZON_STEPS = 1000  # of training over which what was moved must pay


@dataclass(frozen=True)
class Option:
    """A system as the rules see it.

    Attributes:
        name: of the system.
        step_ms: AlltoAll time of every held-out step: float64 [iteration].
        moved_ms: migration of all updates, once.
        moves: whether it moves experts.
        stages: the most that its AlltoAll has.
        lossy: whether it may drop tokens.
        whole_ms: of a whole held-out step, mean, with what the busiest GPU computes; None where that is not known.
    """

    name: str
    step_ms: np.ndarray
    moved_ms: float
    moves: bool
    stages: int
    lossy: bool
    whole_ms: float | None = None

    @property
    def whole_mean_ms(self) -> float:
        """Of a whole step, with its part of the migration; infinite where computation is not known."""
        return math.inf if self.whole_ms is None else self.whole_ms + self.moved_ms / HORIZON_STEPS

    @property
    def mean_ms(self) -> float:
        """Of a step, with its part of the migration."""
        return float(self.step_ms.mean()) + self.moved_ms / HORIZON_STEPS

    def speedup(self, flat: "Option") -> Estimate:
        """Over the flat AlltoAll, migration included."""
        return ratio_of_sums(flat.step_ms, self.step_ms + self.moved_ms / HORIZON_STEPS)


@dataclass(frozen=True)
class Recommendation:
    """The answer.

    Attributes:
        outcome: which rule ended the ladder.
        chosen: name of the system; of the flat AlltoAll for ``stay``; of the fastest for ``unresolved``.
        fastest: name of the fastest system that is not the flat AlltoAll.
        speedup: of AlltoAll, of ``fastest`` for ``stay``, else of ``chosen``.
        resolution: least gain that counts, by the constants.
        why: the rule, with its numbers.
    """

    outcome: Outcome
    chosen: str
    fastest: str
    speedup: Estimate
    resolution: float
    why: str

    @property
    def followed(self) -> str:
        """The system that the answer speaks of: the one to use, else the fastest."""
        return self.fastest if self.outcome == "stay" else self.chosen


def constants_of(cluster: Cluster) -> Constants:
    """Where the least certain of a cluster's constants comes from."""
    kinds: list[Constants] = [_kind(cluster.constants(peers)) for peers in cluster.exchanges]
    return max(kinds, key=lambda kind: (RESOLUTION[kind], kind))


def _kind(constants: AlphaBeta) -> Constants:
    if constants.source.startswith(CALIBRATED):
        return "calibrated"
    if "data sheet" in constants.source.lower():
        return "data sheet"
    return "published" if constants.published else "derived"


def option(assessed: Assessed, cluster: Cluster, share_of_bytes: float = 1.0, whole_ms: float | None = None) -> Option:
    """A system under some constants; `whole_ms` as `Option` has it."""
    candidate = assessed.candidate
    return Option(
        name=candidate.name,
        step_ms=assessed.held_out.step_ms(cluster, share_of_bytes),
        moved_ms=assessed.moved_ms,
        moves=candidate.moves,
        stages=max(scheme.dimension for scheme in candidate.schemes),
        lossy=candidate.lossy,
        whole_ms=whole_ms,
    )


def recommend(options: Sequence[Option], constants: Constants, share: float | None) -> Recommendation:
    """Climb the ladder.

    Args:
        options: the flat AlltoAll first.
        constants: where alpha and beta come from.
        share: of AlltoAll in the user's step; None where it is not known.

    Raises:
        ValueError: nothing to choose from.
    """
    flat, others = options[0], [one for one in options[1:] if not one.lossy]
    if not others:
        raise ValueError("there is no system to compare with the flat AlltoAll")
    resolution = RESOLUTION[constants]
    fastest = min(others, key=lambda one: (one.mean_ms, one.stages, one.name))

    def answer(outcome: Outcome, followed: Option, why: str) -> Recommendation:
        chosen = flat if outcome == "stay" else followed
        return Recommendation(outcome, chosen.name, fastest.name, followed.speedup(flat), resolution, why)

    found = fastest.speedup(flat)
    gain = 1 - 1 / found.value
    if gain < STAY_BELOW_GAIN:
        saves = f"saves {gain:.1%} of the AlltoAll time" if gain > 0 else "saves no AlltoAll time"
        why = f"the fastest other system {saves}, and less than {STAY_BELOW_GAIN:.0%} does not pay"
        return answer("stay", fastest, why)
    if share is not None and (step := float(step_speedup(share, 1 / found.value))) < 1 + STAY_BELOW_STEP_GAIN:
        why = (
            f"with AlltoAll at {share:.1%} of the step even the fastest system makes it {step:.3f} times faster, and "
            f"less than {1 + STAY_BELOW_STEP_GAIN:.2f} does not pay"
        )
        return answer("stay", fastest, why)
    if doubt := _doubt(found, resolution):
        return answer("unresolved", fastest, doubt)
    still = [one for one in others if not one.moves]
    best_still_ms = min((one.mean_ms for one in still), default=math.inf)
    whole_still_ms = min((one.whole_mean_ms for one in still), default=math.inf)
    near = best_still_ms <= fastest.mean_ms * (1 + PLACEMENT_PAYS_FROM)
    first = [one for one in others if one.mean_ms <= fastest.mean_ms * (1 + TIE)]
    # infinite where computation is not known, of all alike
    shorter = [one for one in first if not one.moves or one.whole_mean_ms < whole_still_ms or one.whole_ms is None]
    if near or not shorter:
        tied = [one for one in still if one.mean_ms <= best_still_ms * (1 + TIE)]
        simplest = min(tied, key=lambda one: (one.stages, one.mean_ms, one.name))
        if not _doubt(simplest.speedup(flat), resolution):
            why = (
                f"of the systems that leave experts alone it has the fewest stages within {TIE:.0%} of the fastest; "
                f"moving experts would save {max(1 - fastest.mean_ms / best_still_ms, 0):.1%} more, the time of that "
                f"spread over {HORIZON_STEPS} steps, and "
                + (
                    f"less than {PLACEMENT_PAYS_FROM:.0%} does not pay"
                    if near
                    else "the busiest GPU would compute for longer than that saves"
                )
            )
            return answer("dispatch", simplest, why)
    resolved = [one for one in shorter or first if not _doubt(one.speedup(flat), resolution)]
    chosen = min(resolved, key=lambda one: (one.moved_ms, one.mean_ms, one.name))
    why = f"of the systems within {TIE:.0%} of the fastest it spends the least on moving experts"
    if math.isfinite(best_still_ms) and chosen.moves:
        why += (
            f"; it saves {1 - chosen.mean_ms / best_still_ms:.1%} of the time of the best system that leaves them "
            f"alone, migration spread over {HORIZON_STEPS} steps included"
        )
    return answer("placement" if chosen.moves else "dispatch", chosen, why)


def _doubt(speedup: Estimate, resolution: float) -> str:
    """Why a gain is not told from none; empty where it is."""
    if speedup.value < 1 + resolution:
        least = f"{1 + resolution:.2f} that the model tells from none"
        return f"a predicted speed-up of {speedup.value:.2f} is below the {least}"
    if speedup.low <= 1 and speedup.n >= FEWEST_FOR_INTERVALS:
        return f"the interval of the predicted speed-up, {speedup.low:.2f} to {speedup.high:.2f}, does not exclude 1"
    return ""
