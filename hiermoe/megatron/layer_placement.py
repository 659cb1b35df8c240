"""One layer's experts while a model trains: its policy, what its routing measured, and what was decided and done."""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from hiermoe.dispatch.dispatcher import Dispatcher
from hiermoe.megatron.meter import Meter
from hiermoe.megatron.migration import migrate
from hiermoe.model import RowBytes
from hiermoe.policies.protocol import PlacementPolicy, StaticPolicy, StepContext
from hiermoe.topology.placement import Placement


@dataclass(frozen=True)
class LayerUpdate:
    """What was decided for one layer after one step, and done.

    Attributes:
        layer: Megatron's layer number.
        placement: the new one.
        moves: what it changed, as in `Placement.moves_to`.
        modelled_gain_ms: as in `PlacementUpdate`.
        sent_bytes: by this rank.
        migration_ms: of this rank, its waiting included; of a background move what it took before the optimizer's step,
            when experts and gradients came to their places.
        hidden_ms: until then, from when they began to travel; 0 where they moved at once.
    """

    layer: int
    placement: Placement
    moves: str
    modelled_gain_ms: float | None
    sent_bytes: int
    migration_ms: float
    hidden_ms: float = 0.0

    @property
    def moved_experts(self) -> int:
        """Experts that changed their slot."""
        return len(self.moves.split())


class LayerPlacement:
    """One layer's experts, its policy, and what its routing measured since the last step.

    Attributes:
        keeps_copies: whether it can keep experts in more than one place.
        first_step: of the training, in which the policy began.
        iteration: of the policy, in its first step 0.
    """

    keeps_copies: ClassVar[bool] = False

    def __init__(
        self,
        number: int,
        dispatcher: Dispatcher,
        policy: PlacementPolicy,
        parameters: list[list[torch.nn.Parameter]],
        expert_parameters: int,
        meter: Meter | None = None,
    ) -> None:
        """Make the dispatcher report its routing.

        Args:
            number: Megatron's layer number.
            dispatcher: of the layer.
            policy: of the layer.
            parameters: of every local expert, by slot; what moves.
            expert_parameters: of one expert, for the policy's estimate of what a move costs.
            meter: times the dispatcher's calls; measuring is left out of them.
        """
        self.number, self.dispatcher, self.policy, self.parameters = number, dispatcher, policy, parameters
        self.expert_parameters, self._meter = expert_parameters, meter
        self.measured: Tensor | None = None
        self.travels = False  # whether experts are on their way
        self.measuring_ms = 0.0
        self.first_step = self.iteration = 0
        if not isinstance(policy, StaticPolicy):
            dispatcher.observe = self.observe

    def release(self) -> None:
        """Let the dispatcher go. Experts stay where they are, so they must be at home.

        Raises:
            RuntimeError: an expert is not in the slot that stock Megatron expects it in, or soon will not be.
        """
        if self.travels:
            raise RuntimeError(f"experts of layer {self.number} are on their way: call go_home() first")
        if not self.dispatcher.placement.is_identity:
            raise RuntimeError(f"experts of layer {self.number} are not in their own slots: call go_home() first")
        self.dispatcher.observe = None

    def observe(self, ids_TK: Tensor) -> None:
        """Measure one micro-batch; evaluation does not count."""
        if not self.dispatcher.is_training() or not self.policy.decides_after(self.iteration):
            return
        with nullcontext() if self._meter is None else self._meter.left_out(ids_TK.device):
            started = time.perf_counter()
            hierarchy = self.dispatcher.context.cluster.hierarchy
            source_T = torch.full((len(ids_TK),), self.dispatcher.context.communicators.rank)
            measured = self.policy.measure(ids_TK.cpu(), source_T, self.dispatcher.placement, hierarchy, self.iteration)
            if measured is not None:
                self.measured = measured if self.measured is None else self.measured + measured
            self.measuring_ms += (time.perf_counter() - started) * 1e3

    def move(self, optimizer: MegatronOptimizer | None, new: Placement) -> int:
        """Bring every expert to its place in a new placement, as `migrate`. *Collective.*

        Returns:
            Bytes that this rank sent over the wire.
        """
        group = self.dispatcher.context.communicators.ep_group
        return migrate(self.parameters, optimizer, self.dispatcher.placement, new, group)

    def votes(self) -> Tensor:
        """Which scheme the latest micro-batch of this rank used: int64 [schemes], one of them 1."""
        plan, schemes = self.dispatcher.plan, self.dispatcher.context.schemes
        assert plan is not None
        return torch.tensor([int(scheme == plan.scheme) for scheme in schemes])

    def context(self, votes: Tensor | None) -> StepContext:
        """What the policy decides with: among it the scheme that most ranks used, the first on ties."""
        dispatcher = self.dispatcher
        winner = 0 if votes is None else votes.tolist().index(int(votes.max()))
        return StepContext(
            iteration=self.iteration,
            cluster=dispatcher.context.cluster,
            scheme=dispatcher.context.schemes[winner],
            row_bytes=RowBytes.alike(dispatcher.row_bytes),
            expert_parameters=self.expert_parameters,
        )
