"""HierD-ES as a placement policy (paper, Sec. IV)."""

from torch import Tensor

from hiermoe.planner.cost import ALLTOALLS_PER_STEP
from hiermoe.planner.maxima import MaxFunction
from hiermoe.policies.price_of_moving import STATE_BYTES_PER_PARAMETER, price_migration
from hiermoe.policies.protocol import PlacementPolicy, PlacementUpdate, StepContext, refuse_copies
from hiermoe.policies.swap import SwapStatistics, measure_swaps, swap_times, time_of_groups
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement

PLAIN = MaxFunction("plain")


class HierDESPolicy(PlacementPolicy):
    """HierD-ES: per update the one swap of two experts that minimises the modelled AlltoAll time (paper, Sec. IV).

    With ``max_swaps`` above 1 further swaps follow in the same update, each the best one after those before it. What
    they save is modelled from the same counts, exactly where no group exchanges more than one expert and else from an
    upper bound on what groups need (:meth:`SwapStatistics.swapped`): on the tokens that it was chosen from, an update
    saves at least what it says.
    """

    def __init__(
        self,
        interval: int = 1,
        max_function: str = "smooth",
        gamma: float = 10.0,
        gated: bool = False,
        horizon: int = 100,
        max_swaps: int = 1,
    ) -> None:
        """Set the policy up for one layer.

        Args:
            interval: iterations between updates.
            max_function: plain, smooth or logsumexp.
            gamma: sharpness of the smooth ones.
            gated: adopt a swap only if what it saves over ``horizon`` iterations exceeds its migration (full optimizer
                state over the idle link).
            horizon: iterations that a gated swap may take to pay.
            max_swaps: swaps in one update.

        Raises:
            ValueError: an interval, horizon or max_swaps below 1, an unknown max function, gamma not positive.
        """
        if min(interval, horizon, max_swaps) < 1:
            raise ValueError(f"interval={interval}, horizon={horizon}, max_swaps={max_swaps}: all must be at least 1")
        self.interval, self.gated, self.horizon, self.max_swaps = interval, gated, horizon, max_swaps
        self.measures_alike = (HierDESPolicy, interval)
        self.max_function = MaxFunction(max_function, gamma)  # type: ignore[arg-type] - checked by MaxFunction

    def measure(
        self, expert_ids_NK: Tensor, source_N: Tensor, placement: Placement, hierarchy: Hierarchy, iteration: int
    ) -> Tensor | None:
        """Swap statistics, in iterations that end with an update."""
        if (iteration + 1) % self.interval:
            return None
        refuse_copies(self, placement)
        return measure_swaps(expert_ids_NK, placement, hierarchy)

    def decides_after(self, iteration: int) -> bool:
        """At the end of an interval."""
        return (iteration + 1) % self.interval == 0

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        """The best swaps, as long as there are any and, gated, they pay."""
        if summed is None:
            return None
        stats = SwapStatistics.unpack(summed, placement.num_experts, context.cluster.hierarchy)
        priced = context.scheme, context.cluster, context.row_bytes
        before_ms = now_ms = time_of_groups(stats.needed, *priced, PLAIN)
        planned, last = placement, None
        for _ in range(self.max_swaps):
            if last is not None:
                stats = stats.swapped(*last)
            pair = swap_times(stats, *priced, self.max_function).best()
            if pair is None:
                break
            after_ms, expert_at = time_of_groups(stats.needed_after(*pair), *priced, PLAIN), planned.expert_at_S
            swapped = planned.swapped(int(expert_at[pair[0]]), int(expert_at[pair[1]]))
            if self.gated and not self._pays(ALLTOALLS_PER_STEP * (now_ms - after_ms), planned, swapped, context):
                break
            planned, now_ms, last = swapped, after_ms, pair
        if planned is placement:
            return None
        return PlacementUpdate(planned, ALLTOALLS_PER_STEP * (before_ms - now_ms))

    def shared_state(self) -> dict[str, Tensor] | None:
        """Nothing: one rank decides."""
        return {}

    def _pays(self, gain_ms: float, old: Placement, new: Placement, context: StepContext) -> bool:
        """Whether a swap saves more over the horizon than its own migration takes.

        Each swap is priced alone: moved together they would share links, and take no longer than one after the other.
        """
        expert_bytes = STATE_BYTES_PER_PARAMETER * context.expert_parameters
        migration = price_migration(old, new, context.cluster, expert_bytes, context.num_experts)
        return gain_ms * self.horizon > migration.link_ms
