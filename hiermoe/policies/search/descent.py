"""Exact swaps, one after another: down in time or towards a target, by statistics that follow the placement."""

import math
import time
from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

from hiermoe.model import RowBytes
from hiermoe.planner.maxima import MaxFunction
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.planner.token_sets import TokenSets
from hiermoe.policies.swap import SwapStatistics, SwapTimes, measure_swaps, swap_times, time_of_groups
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.placement import Placement


class SwapTable:
    """HierD-ES's statistics of some expert sets under a placement, kept exact while experts are exchanged.

    Statistics are sums over sets, and a swap changes only what the sets with exactly one of the two experts add:
    about 2 * K / E of all.
    """

    def __init__(self, sets: TokenSets, placement: Placement, cluster: Cluster) -> None:
        """Count all sets once.

        Args:
            sets: of any steps; their steps do not matter here.
            placement: where to start.
            cluster: hierarchy, alpha and beta.
        """
        self.placement, self.cluster = placement, cluster
        self._sets = sets
        chosen = sets.ids_NK.reshape(-1)
        self._set_by_expert = torch.argsort(chosen, stable=True) // sets.ids_NK.shape[1]
        ends = torch.bincount(chosen, minlength=sets.num_experts).cumsum(0).tolist()
        self._of_expert = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        self._packed = measure_swaps(sets.ids_NK, placement, cluster.hierarchy, sets.weight_N)
        # Of a mean step, so that alpha and bytes keep their proportion.
        self._scale = float(sets.tokens_S.double().mean()) / max(sets.tokens, 1)

    @property
    def statistics(self) -> SwapStatistics:
        """Counts under the present placement."""
        return SwapStatistics.unpack(self._packed, self._sets.num_experts, self.cluster.hierarchy)

    def times(self, scheme: DispatchScheme, row_bytes: RowBytes, max_function: MaxFunction) -> SwapTimes:
        """Q under the present placement, for a step of mean size."""
        return swap_times(self.statistics, scheme, self.cluster, row_bytes.times(self._scale), max_function)

    def now_ms(self, scheme: DispatchScheme, row_bytes: RowBytes) -> float:
        """One AlltoAll under the present placement, with the plain maximum, for a step of mean size."""
        scaled_bytes = row_bytes.times(self._scale)
        return time_of_groups(self.statistics.needed, scheme, self.cluster, scaled_bytes, MaxFunction("plain"))

    def swap(self, r: int, c: int) -> None:
        """Exchange the experts in slots r and c."""
        expert_at = self.placement.expert_at_S
        a, b = int(expert_at[r]), int(expert_at[c])
        changed = torch.cat([self._with_only(a, b), self._with_only(b, a)])
        ids_NK, weight_N = self._sets.ids_NK[changed], self._sets.weight_N[changed]
        after = self.placement.swapped(a, b)
        as_before_NK = torch.where(
            ids_NK == a, b, torch.where(ids_NK == b, a, ids_NK)
        )  # what they were, seen from after
        both_NK, signed_N = torch.cat([ids_NK, as_before_NK]), torch.cat([weight_N, -weight_N])
        self._packed = self._packed + measure_swaps(both_NK, after, self.cluster.hierarchy, signed_N)
        self.placement = after

    def copy(self) -> "SwapTable":
        """Another table that starts from here."""
        return copy(self)  # no tensor is ever changed in place

    def _with_only(self, a: int, b: int) -> Tensor:
        """Sets with expert a and not b: int64 [n]."""
        found = self._set_by_expert[self._of_expert[a]]
        return found[~(self._sets.ids_NK[found] == b).any(1)]


class Budget:
    """How long a search may take: in seconds, in evaluations of Q, or both, whichever ends first.

    Only evaluations give the same result every time and on every rank.
    """

    def __init__(
        self, seconds: float | None, steps: int | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Start the clock.

        Raises:
            ValueError: neither limit, or one that is not positive.
        """
        if seconds is None and steps is None:
            raise ValueError("a search needs an end: seconds, steps, or both")
        if (seconds is not None and not seconds > 0) or (steps is not None and steps < 1):
            raise ValueError(f"seconds={seconds}, steps={steps}: limits must be positive")
        self._clock, self._started = clock, clock()
        self._seconds, self._steps = seconds, steps
        self.steps = 0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self._clock() - self._started

    @property
    def seconds_left(self) -> float:
        """Until the limit; infinite where there is none."""
        return math.inf if self._seconds is None else self._seconds - self.seconds

    @property
    def is_spent(self) -> bool:
        """Whether a limit is reached."""
        return self.seconds_left <= 0 or (self._steps is not None and self.steps >= self._steps)


def descend(
    table: SwapTable, scheme: DispatchScheme, row_bytes: RowBytes, max_function: MaxFunction, budget: Budget
) -> None:
    """Do the best swap again and again until none is left or the budget is spent.

    Args:
        table: left at the local optimum, or on the way to it.
        scheme: HDd, priced by Q.
        row_bytes: in each AlltoAll of a step.
        max_function: of Q. A smooth one sees more than the busiest group, so that descents do not end on plateaus.
        budget: every evaluation of Q is a step.
    """
    while not budget.is_spent:
        budget.steps += 1
        pair = table.times(scheme, row_bytes, max_function).best()
        if pair is None:
            return
        table.swap(*pair)


def approach(
    table: SwapTable,
    target: Placement,
    max_moved: int,
    scheme: DispatchScheme,
    row_bytes: RowBytes,
    max_function: MaxFunction,
) -> Placement:
    """Exchange experts in pairs, each time the pair after which the modelled time is smallest.

    A pair counts if it brings an expert to its GPU of the target and moves no expert that is there already. Experts are
    equally large and every pair moves two, so the smallest time is the largest gain per byte. A pair may cost time: on
    the way to a better placement some do.

    Args:
        table: under the placement to start from; left at the result.
        target: where experts should sit; named as :func:`hiermoe.policies.search.align.aligned` does.
        max_moved: experts that may move, at least 2.
        scheme: HDd, priced by Q.
        row_bytes: in each AlltoAll of a step.
        max_function: of Q.

    Returns:
        A placement that is closer to the target, or has the target's GPUs.
    """
    ranks = table.cluster.hierarchy.num_ranks
    wanted_E = target.rank_of(ranks)
    for _ in range(max_moved // 2):
        rank_E, expert_at = table.placement.rank_of(ranks), table.placement.expert_at_S
        if torch.equal(rank_E, wanted_E):
            break
        times = table.times(scheme, row_bytes, max_function)
        r_P, c_P = (expert_at[slots] for slots in times.slots_2P)  # experts of every pair
        away_E = rank_E != wanted_E
        arrives = (wanted_E[r_P] == rank_E[c_P]) | (wanted_E[c_P] == rank_E[r_P])
        useful = arrives & away_E[r_P] & away_E[c_P]
        best = int(times.after_ms_P.masked_fill(~useful, float("inf")).argmin())
        table.swap(*times.slots_2P[:, best].tolist())
    return table.placement
