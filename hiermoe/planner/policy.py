"""Placement policies: who decides where experts sit, from what."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hiermoe.planner.cost import ALLTOALLS_PER_STEP
from hiermoe.planner.maxima import MaxFunction
from hiermoe.planner.migration import STATE_BYTES_PER_PARAMETER, price_migration
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.planner.swap import SwapStatistics, best_swap, measure_swaps, swap_times
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement


@dataclass(frozen=True)
class StepContext:
    """What every rank knows at the optimizer boundary.

    Attributes:
        iteration: of the run, from 0.
        cluster: hierarchy and constants.
        scheme: what the step was dispatched with (HDd*).
        row_bytes: M * v.
        expert_parameters: of one expert.
    """

    iteration: int
    cluster: Cluster
    scheme: DispatchScheme
    row_bytes: int
    expert_parameters: int


@dataclass(frozen=True)
class PlacementUpdate:
    """A decision to move experts before the next step.

    Attributes:
        placement: the new one.
        modelled_gain_ms: AlltoAll time per step that the policy expects to save (four AlltoAlls, plain maximum); None
            where the policy has no model of time.
    """

    placement: Placement
    modelled_gain_ms: float | None


class PlacementPolicy(Protocol):
    """One layer's policy. The same sums give the same decision on every rank."""

    def measure(
        self, expert_ids_NK: Tensor, placement: Placement, hierarchy: Hierarchy, iteration: int
    ) -> Tensor | None:
        """What the policy must know of a micro-batch, as one tensor that ranks can sum; None: nothing."""
        ...

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        """Decide on the placement of the next step from the summed measurements; None: stay."""
        ...


class StaticPolicy:
    """Experts stay where they are."""

    def measure(
        self, expert_ids_NK: Tensor, placement: Placement, hierarchy: Hierarchy, iteration: int
    ) -> Tensor | None:
        """Nothing."""
        return None

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        """Stay."""
        return None


class HierDESPolicy:
    """HierD-ES: per update the one swap of two experts that minimises the modelled AlltoAll time (paper, Sec. IV)."""

    def __init__(
        self,
        interval: int = 1,
        max_function: str = "smooth",
        gamma: float = 10.0,
        gated: bool = False,
        horizon: int = 100,
    ) -> None:
        """Set the policy up for one layer.

        Args:
            interval: iterations between updates.
            max_function: plain, smooth or logsumexp.
            gamma: sharpness of the smooth ones.
            gated: adopt a swap only if what it saves over ``horizon`` iterations exceeds its migration (full optimizer
                state over the idle link).
            horizon: iterations that a gated swap may take to pay.

        Raises:
            ValueError: an interval or horizon below 1, an unknown max function, gamma not positive.
        """
        if interval < 1 or horizon < 1:
            raise ValueError(f"interval={interval}, horizon={horizon}: both must be at least 1")
        self.interval, self.gated, self.horizon = interval, gated, horizon
        self.max_function = MaxFunction(max_function, gamma)  # type: ignore[arg-type] - checked by MaxFunction

    def measure(
        self, expert_ids_NK: Tensor, placement: Placement, hierarchy: Hierarchy, iteration: int
    ) -> Tensor | None:
        """Swap statistics, in iterations that end with an update."""
        if (iteration + 1) % self.interval:
            return None
        return measure_swaps(expert_ids_NK, placement, hierarchy).pack()

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        """The best swap, if there is one and, gated, if it pays."""
        if summed is None:
            return None
        stats = SwapStatistics.unpack(summed, placement.num_experts, context.cluster.hierarchy)

        def q(max_function: MaxFunction) -> Tensor:
            return swap_times(stats, context.scheme, context.cluster, context.row_bytes, max_function)

        pair = best_swap(q(self.max_function))
        if pair is None:
            return None
        plain = q(MaxFunction("plain"))
        gain_ms = ALLTOALLS_PER_STEP * float(plain[0, 0] - plain[pair])
        expert_at = placement.expert_at()
        update = PlacementUpdate(placement.swapped(int(expert_at[pair[0]]), int(expert_at[pair[1]])), gain_ms)
        if self.gated:
            expert_bytes = STATE_BYTES_PER_PARAMETER * context.expert_parameters
            cost_ms = price_migration(placement, update.placement, context.cluster, expert_bytes).link_ms
            if gain_ms * self.horizon <= cost_ms:
                return None
        return update
