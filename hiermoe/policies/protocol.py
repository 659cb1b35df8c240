"""Placement policies: who decides where experts sit, from what."""

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from hiermoe.model import RowBytes
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
        row_bytes: in each AlltoAll of a step.
        expert_parameters: of one expert.
        num_experts: E, where placements have empty slots with numbers from there on; None: they have none.
    """

    iteration: int
    cluster: Cluster
    scheme: DispatchScheme
    row_bytes: RowBytes
    expert_parameters: int
    num_experts: int | None = None


@dataclass(frozen=True)
class CopyTerms:
    """What a policy that keeps experts in more than one place sends for them in a step, beside tokens.

    Weights (bf16) go from an expert's home to its copies, gradients back, where they are summed. Copies that keep
    training state get the summed gradient instead, and update themselves.

    Attributes:
        shared_buffers: layers share the slots: their weights are sent in forward and once more before backward.
        gradient_bytes: of a parameter: 2 or 4.
        relays_from: from so many copies of an expert on, one passes it on to the next; None: home sends to each.
        sharded: nobody is at home: every GPU keeps a part of every expert, and fills all its slots from these.
        with_state: copies keep training state; layers share no buffers then.

    Raises:
        ValueError: another number of bytes, or shared buffers with state.
    """

    shared_buffers: bool
    gradient_bytes: int
    relays_from: int | None = None
    sharded: bool = False
    with_state: bool = False

    def __post_init__(self) -> None:
        if self.gradient_bytes not in (2, 4):
            raise ValueError(f"gradient_bytes={self.gradient_bytes} must be 2 or 4")
        if self.with_state and self.shared_buffers:
            raise ValueError("shared_buffers=True and with_state=True: layers cannot share training state")


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
    """One layer's policy. The same sums give the same decision on any rank. This one lets experts stay for ever.

    Attributes:
        measures_alike: policies with equal ones measure the same in the same iteration, of the same tokens under the
            same placement, so that simulated runs may share it; None: it depends on more than that.
        copies: what its copies of experts need; None: it makes none.
    """

    measures_alike: Hashable = None
    copies: CopyTerms | None = None

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

    def decides_after(self, iteration: int) -> bool:
        """Whether an iteration is to be followed by `decide`, the same on every rank.

        After one that is not, nothing is summed: what was measured in it is lost.
        """
        return True

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        """Decide on the placement of the next step from the summed measurements; None: stay."""
        return None

    def rebalance(self, pairs_GE: Tensor, placement: Placement, context: StepContext) -> Placement | None:
        """Copies for one micro-batch whose exact counts are known: before it is dispatched, for it alone.

        Only a policy that says what ``copies`` need is asked. Before and after, experts are where ``placement`` has
        them.

        Args:
            pairs_GE: int64 [G, E], tokens of each source GPU that chose each logical expert.
            placement: where experts are at home; here always one slot each.
            context: its scheme is the first candidate: the choice follows from the placement.

        Returns:
            Where experts are in the micro-batch; None: where ``placement`` has them.
        """
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """What the policy remembers from one iteration to the next, the same wherever it decides; for checkpoints."""
        return {}

    def shared_state(self) -> dict[str, Tensor] | None:
        """What ranks need that measure while another decides for all: the part of the state that measuring depends on.

        They are given it after decisions that change it, by :meth:`load_state_dict`. A policy that returns something,
        be it an empty dictionary, takes a layer's decisions on one rank, which spares all others their cost. One that
        inherits from such a policy and measures with more state, or has `rebalance`, must say so here.

        Returns:
            The part, in tensors of its own; None: every rank decides for itself, since `rebalance` or more of the
            state is needed there.
        """
        return None

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: the state of another policy.
        """
        if state:
            raise ValueError(f"{type(self).__name__} remembers nothing, the state has {', '.join(state)}")


class StaticPolicy(PlacementPolicy):
    """Experts stay where they are."""

    def decides_after(self, iteration: int) -> bool:
        """Never."""
        return False


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
