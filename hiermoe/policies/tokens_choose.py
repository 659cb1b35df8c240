"""Any policy with copies, but each token chooses among them for itself, so that it goes to few groups."""

from dataclasses import replace

from torch import Tensor

from hiermoe.policies.protocol import PlacementPolicy, PlacementUpdate, StepContext
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement


class TokensChooseCopies(PlacementPolicy):
    """The copies of another policy, which knows nothing of what tokens do with them.

    It plans as if they used the copies that it says for their sources (:attr:`Placement.gathered_in`).
    """

    def __init__(self, policy: PlacementPolicy) -> None:
        """Set it up for one layer.

        Args:
            policy: the other one.

        Raises:
            ValueError: it makes no copies.
        """
        if policy.copies is None:
            raise ValueError(f"copy_choice=token, but {type(policy).__name__} makes no copies of experts")
        self.policy, self.copies, self.measures_alike = policy, policy.copies, policy.measures_alike

    def measure(
        self, expert_ids_NK: Tensor, source_N: Tensor, placement: Placement, hierarchy: Hierarchy, iteration: int
    ) -> Tensor | None:
        """What the policy measures."""
        return self.policy.measure(expert_ids_NK, source_N, _as_planned(placement), hierarchy, iteration)

    def decides_after(self, iteration: int) -> bool:
        """When the policy does."""
        return self.policy.decides_after(iteration)

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        """What the policy decides."""
        update = self.policy.decide(summed, _as_planned(placement), context)
        return None if update is None else replace(update, placement=_gathered(update.placement, context))

    def rebalance(self, pairs_GE: Tensor, placement: Placement, context: StepContext) -> Placement | None:
        """The policy's copies for one micro-batch."""
        acting = self.policy.rebalance(pairs_GE, _as_planned(placement), context)
        return None if acting is None else _gathered(acting, context)

    def state_dict(self) -> dict[str, Tensor]:
        """The policy's."""
        return self.policy.state_dict()

    def shared_state(self) -> dict[str, Tensor] | None:
        """The policy's."""
        return self.policy.shared_state()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Hand it to the policy.

        Raises:
            ValueError: the state of another policy.
        """
        self.policy.load_state_dict(state)


def _gathered(placement: Placement, context: StepContext) -> Placement:
    """With tokens that choose; experts of one slot each leave nothing to choose."""
    return replace(placement, gathered_in=context.cluster.hierarchy) if placement.has_copies else placement


def _as_planned(placement: Placement) -> Placement:
    return placement if placement.gathered_in is None else replace(placement, gathered_in=None)
