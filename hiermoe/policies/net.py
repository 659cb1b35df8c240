"""Swaps that pay after everything is counted, over a horizon learnt from how long earlier ones lasted.

A swap is chosen on the tokens of one step. On others it saves less (`carried`), and what it saves there fades as
routing changes (`kept`, from one update to the next). So a swap that saves g ms a step now saves

    g * interval * carried * (1 + kept + kept^2 + ...) = g * interval * carried / (1 - kept)

from then on, and is made where that exceeds the part of its migration that the step waits for. Both numbers are learnt
in the run: at every later update the policy prices the undoing of its recent swaps on the tokens that it has then.
"""

from typing import Any

import torch
from torch import Tensor

from hiermoe.planner.cost import ALLTOALLS_PER_STEP
from hiermoe.policies.hierd_es import PLAIN, HierDESPolicy
from hiermoe.policies.price_of_moving import STATE_BYTES_PER_PARAMETER, price_migration
from hiermoe.policies.protocol import PlacementUpdate, StepContext
from hiermoe.policies.swap import SwapStatistics, time_of_groups
from hiermoe.topology.placement import Placement

REMEMBERED = 16  # swaps whose undoing is priced
PRIOR = 2.0  # swaps that the first guess counts as


class NetPolicy(HierDESPolicy):
    """HierD-ES that swaps where the gain until it has faded exceeds the migration that is not hidden."""

    def __init__(
        self,
        interval: int = 1,
        max_function: str = "smooth",
        gamma: float = 10.0,
        exposed: float = 1.0,
        first: int = 100,
        longest: int = 1000,
    ) -> None:
        """Set the policy up for one layer.

        Args:
            interval: iterations between updates.
            max_function: plain, smooth or logsumexp.
            gamma: sharpness of the smooth ones.
            exposed: share of a migration that the step waits for.
            first: iterations that a swap is taken to last before there is experience.
            longest: iterations beyond which no gain counts.

        Raises:
            ValueError: as `HierDESPolicy`; exposed not from 0 to 1; first below interval or above longest.
        """
        super().__init__(interval, max_function, gamma, gated=True, horizon=first)
        if not (0 <= exposed <= 1 and interval <= first <= longest):
            raise ValueError(
                f"exposed={exposed}, first={first}, longest={longest}: exposed must be from 0 to 1, and first from "
                f"interval={interval} to longest"
            )
        self.exposed, self.first, self.longest = exposed, first, longest
        # Of recent swaps: two slots, the experts that came there, what the swap saved when it was last looked at (ms a
        # step), and how often it has been looked at.
        self._swaps: list[tuple[Any, ...]] = []
        self._carried, self._kept = _Share(1.0), _Share(1 - interval / first)

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        """The best swap, if it pays."""
        if summed is None:
            return None
        stats = SwapStatistics.unpack(summed, placement.num_experts, context.cluster.hierarchy)
        self._look_back(stats, placement, context)
        self.horizon = self.expected_iterations()
        update = super().decide(summed, placement, context)
        if update is not None and update.modelled_gain_ms is not None:
            r, c = placement.changed_slots(update.placement)
            experts = update.placement.expert_at_S[[r, c]].tolist()
            self._swaps = [*self._swaps, (r, c, *experts, update.modelled_gain_ms, 0)][-REMEMBERED:]
        return update

    def expected_iterations(self) -> int:
        """For how many iterations a swap saves what it saves on the tokens that it was chosen on."""
        lasting = self.interval / max(1 - self._kept.value, self.interval / self.longest)
        return int(lasting * max(self._carried.value, 0.0))

    def _look_back(self, stats: SwapStatistics, placement: Placement, context: StepContext) -> None:
        """Price the undoing of recent swaps on these tokens; forget those whose experts have moved on."""
        priced = context.scheme, context.cluster, context.row_bytes
        now_ms, still = time_of_groups(stats.needed, *priced, PLAIN), []
        for r, c, first, second, saved_ms, looks in self._swaps:
            if placement.expert_at_S[[r, c]].tolist() != [first, second]:
                continue
            without_ms = time_of_groups(stats.needed_after(r, c), *priced, PLAIN)
            saves_ms = ALLTOALLS_PER_STEP * (without_ms - now_ms)
            (self._kept if looks else self._carried).add(saved_ms, saves_ms)
            if saves_ms > 0:
                still.append((r, c, first, second, saves_ms, looks + 1))
        self._swaps = still

    def _pays(self, gain_ms: float, old: Placement, new: Placement, context: StepContext) -> bool:
        """Whether a swap saves more until it has faded than its migration makes the step wait."""
        expert_bytes = STATE_BYTES_PER_PARAMETER * context.expert_parameters
        migration = price_migration(old, new, context.cluster, expert_bytes, context.num_experts)
        return gain_ms * self.horizon > self.exposed * migration.link_ms

    def state_dict(self) -> dict[str, Tensor]:
        """Recent swaps: float64 [n, 6]; what was learnt: float64 [2, 3]."""
        return {
            "swaps": torch.tensor(self._swaps, dtype=torch.float64).reshape(-1, 6),
            "learnt": torch.tensor([self._carried.sums, self._kept.sums], dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: the state of another policy.
        """
        if state.keys() - {"swaps", "learnt"}:
            raise ValueError(f"NetPolicy remembers swaps and what it learnt, the state has {', '.join(state)}")
        if state:
            self._swaps = [(*map(int, row[:4]), row[4], int(row[5])) for row in state["swaps"].tolist()]
            self._carried.sums, self._kept.sums = state["learnt"].tolist()


class _Share:
    """What was found of what was expected, and what is believed before much has been seen."""

    def __init__(self, before: float) -> None:
        self.before = before
        self.sums = [0.0, 0.0, 0.0]  # number seen, expected, found

    def add(self, expected: float, found: float) -> None:
        """One more."""
        self.sums = [total + more for total, more in zip(self.sums, (1.0, expected, found), strict=True)]

    @property
    def value(self) -> float:
        """The share; the belief weighs as much as `PRIOR` that were seen."""
        seen, expected, found = self.sums
        return (PRIOR * self.before + (seen * found / expected if seen else 0.0)) / (PRIOR + seen)
