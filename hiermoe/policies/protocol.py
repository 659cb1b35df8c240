"""Placement policies: who decides where experts sit, from what."""

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from hiermoe.planner.scheme import DispatchScheme
from hiermoe.records.status import NotApplicable
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
        modelled_gain_ms: AlltoAll time per step that the policy expects to save (four AlltoAlls, plain maximum) on the
            tokens that it decided from; None where the policy has no model of time.
    """

    placement: Placement
    modelled_gain_ms: float | None


@dataclass(frozen=True)
class Start:
    """Where a run may begin, so that what its policy learns from has not to be run.

    Attributes:
        iteration: the first one.
        placement: in force in it.
        policy: what the policy remembers of the iterations before.
    """

    iteration: int
    placement: Placement
    policy: dict[str, Tensor] = field(default_factory=dict)


class PlacementPolicy:
    """One layer's policy. The same sums give the same decision on every rank. This one lets experts stay for ever.

    Attributes:
        measures_alike: policies with equal ones measure the same in the same iteration, of the same tokens under the
            same placement, so that simulated runs may share it; None: it depends on more than that.
    """

    measures_alike: Hashable = None

    def measure(
        self, expert_ids_NK: Tensor, source_N: Tensor, placement: Placement, hierarchy: Hierarchy, iteration: int
    ) -> Tensor | None:
        """What the policy must know of a micro-batch, as one tensor that micro-batches and ranks sum; None: nothing.

        Args:
            expert_ids_NK: int64 [N, K], logical experts.
            source_N: int64 [N], GPU that holds each token.
            placement: in force.
            hierarchy: groups of GPUs.
            iteration: of the run, from 0.

        Raises:
            NotApplicable: experts have copies, and the policy cannot handle them.
        """
        return None

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        """Decide on the placement of the next step from the summed measurements; None: stay."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """What the policy remembers from one iteration to the next, the same on every rank; for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: the state of another policy.
        """
        if state:
            raise ValueError(f"{type(self).__name__} remembers nothing, the state has {', '.join(state)}")


class StaticPolicy(PlacementPolicy):
    """Experts stay where they are."""


def refuse_copies(policy: PlacementPolicy, placement: Placement) -> None:
    """To be called by a policy that gives every expert one slot.

    Raises:
        NotApplicable: experts have copies.
    """
    if placement.has_copies:
        raise NotApplicable(
            f"{type(policy).__name__} gives every expert one slot, but {placement.num_experts} experts have "
            f"{placement.num_slots} slots"
        )
