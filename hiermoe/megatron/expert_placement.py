"""Runs a system's placement policy in training: measure in every forward, decide and move experts after every step.

What a training loop of one's own needs, with a stock Megatron-Core model, its optimizer and schedule:

    placement = attach(model, "hiermoe", cluster)      # once, after Megatron's process groups exist
    for step in range(steps):
        ...                                            # forwards and backwards, any number of micro-batches
        optimizer.step()
        placement.step(optimizer)                      # moves experts; before anything else looks at the weights

Everything else stays as it is: losses, gradients, logged loads and Megatron's checkpoints are those of fixed experts.
`hiermoe.megatron.checkpoint` saves and resumes placements and policies too; without it, they start anew.
The distributed optimizer divides masters and moments among replicas; they go from owner to owner. Stages of a
pipeline each look after their own layers. Tensor (with sequence) and context parallelism divide the tokens that a rank
has, and attention; experts stay whole (expert_tensor_parallel_size=1).
"""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import MegatronOptimizer

from hiermoe.megatron.deciding import decide, policy_states
from hiermoe.megatron.expert_state import check_optimizer
from hiermoe.megatron.layer_placement import LayerPlacement, LayerUpdate
from hiermoe.megatron.migration import Travelling, bytes_on_the_way
from hiermoe.megatron.pipeline_stage import is_stage, ranks_with_same_layers
from hiermoe.policies.protocol import PlacementPolicy, PlacementUpdate
from hiermoe.topology.placement import Placement

BACKGROUND_BYTES = 2**30  # at a rank, all layers: what arrives early, and buffers of what leaves; more moves at once


class _OnTheWay(NamedTuple):
    layer: LayerPlacement
    update: PlacementUpdate
    travelling: Travelling
    begun: float


class ExpertPlacement:
    """The placement of a model's experts while it trains.

    Example:
        >>> placement = attach(model, "hiermoe", cluster)
        >>> start = load_latest(folder, model, optimizer, schedule, placement)  # 0 where there is none
        >>> for step in range(start, steps):
        ...     ...                        # forward, backward, optimizer.step()
        ...     placement.step(optimizer)  # what it decides acts from the next step on
        ...     if (step + 1) % 100 == 0:
        ...         save_checkpoint(folder, step + 1, model, optimizer, schedule, placement)
    """

    def __init__(
        self,
        layers: list[LayerPlacement],
        group: dist.ProcessGroup | None = None,
        iteration: int = 0,
        background: dist.ProcessGroup | None = None,
    ) -> None:
        """Take charge of these layers.

        Args:
            layers: none for a system that moves no experts.
            group: ranks that decide together; None for all that have the same layers.
            iteration: number of the coming step.
            background: of all ranks that hold replicas of them, for experts that travel beside forward and backward
                passes; None where they move between steps.
        """
        self.layers = layers
        self._group, self._background = group, background
        self._on_the_way: list[_OnTheWay] = []
        self._bytes_on_the_way = 0  # at most, at any rank: the same on all
        self._landed: list[LayerUpdate] = []
        self._watched: MegatronOptimizer | None = None
        self.planning_ms = 0.0  # of the latest step, all layers: measuring, reducing and deciding
        self.migration_ms = 0.0  # likewise: moving after the step, and beginning to
        self.landing_ms = 0.0  # likewise, within the optimizer's step: the part of background moves that is not hidden
        self._start_iteration(iteration)

    @property
    def measuring_ms(self) -> float:
        """Of the step that runs, all layers: what policies have measured in its forward passes."""
        return sum(layer.measuring_ms for layer in self.layers)

    @property
    def moves_travel(self) -> bool:
        """Whether experts are on their way; the same on every rank."""
        return bool(self._on_the_way)

    def step(self, optimizer: MegatronOptimizer | None) -> list[LayerUpdate]:
        """Decide from what the step's routing measured, and move experts. Call it after the optimizer's step.

        *Collective: every rank must call it.* Measurements of all layers are summed over all ranks at once. Layers are
        divided among ranks, and each hears what the others decided (:mod:`hiermoe.megatron.deciding`).

        Args:
            optimizer: whose state moves with the weights; None where there is none.

        Where they travel in the background, they begin to here, and arrive within the next step of the optimizer,
        before it changes anything. For a layer whose experts have just arrived nothing is decided, since what it
        measured is of where they were.

        Returns:
            The updates, of layers that had one, whose experts have arrived.

        Raises:
            ValueError: an optimizer that keeps state elsewhere, or a policy that makes copies where layers keep none.
            RuntimeError: ranks decided differently or one of them failed to, a rank died while experts moved, or
                experts are still on their way.
        """
        if optimizer is not None and self.layers:
            check_optimizer(optimizer)
        if self._on_the_way:
            self._abandon()
            raise RuntimeError(
                "experts are on their way, and the optimizer that step() was given has not stepped since"
            )
        done, self._landed = self._landed, []
        self.landing_ms = sum(update.migration_ms for update in done)
        started = time.perf_counter()
        landed = {update.layer for update in done}
        deciding = {
            place: layer
            for place, layer in enumerate(self.layers)
            if layer.number not in landed and layer.policy.decides_after(layer.iteration)
        }
        updates = decide(deciding, self._deciding_group()) if deciding else {}
        self.planning_ms = (time.perf_counter() - started) * 1e3 + self.measuring_ms
        started = time.perf_counter()
        for place, update in updates.items():
            layer = self.layers[place]
            if self._travels(layer, update) and optimizer is not None:
                self._send_off(layer, update, optimizer)
            else:
                done.append(self._move(layer, update, optimizer))
        self.migration_ms = (time.perf_counter() - started) * 1e3
        self._start_iteration(self._iteration + 1)
        return done

    def go_home(self, optimizer: MegatronOptimizer | None) -> None:
        """Move every expert to the slot of its own number. *Collective: every rank must call it.*

        Raises:
            ValueError: an optimizer that keeps state elsewhere.
        """
        homes = {x.number: Placement.identity(x.dispatcher.placement.num_experts) for x in self.layers}
        self.move_to(homes, optimizer)

    def move_to(self, placements: Mapping[int, Placement], optimizer: MegatronOptimizer | None) -> list[LayerUpdate]:
        """Move experts to where they are told to be. *Collective: every rank must call it.*

        Args:
            placements: by layer number; layers without one stay as they are.
            optimizer: whose state moves with the weights; None where it has none yet.

        Raises:
            ValueError: an optimizer that keeps state elsewhere.
        """
        if optimizer is not None:
            check_optimizer(optimizer)
        self._abandon()
        wanted = [(layer, placements[layer.number]) for layer in self.layers if layer.number in placements]
        return [self._move(layer, PlacementUpdate(placement, None), optimizer) for layer, placement in wanted]

    def state_dict(self) -> dict[str, Any]:
        """Placements and what policies remember, the same on every rank; belongs beside a checkpoint.

        *Collective: every rank must call it.*
        """
        states = policy_states(self.layers, self._deciding_group)
        layers = [
            {
                "layer": layer.number,
                "slot_E": layer.dispatcher.placement.slot_E.clone(),
                "policy": _kind(layer.policy),
                "policy_state": state,
                "first_step": layer.first_step,
            }
            for layer, state in zip(self.layers, states, strict=True)
        ]
        if is_stage():
            group: Any = parallel_state.get_pipeline_model_parallel_group()
            of_stages: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(of_stages, layers, group=group)
            layers = sorted((layer for stage in of_stages for layer in stage), key=lambda layer: layer["layer"])
        return {"iteration": self._iteration, "layers": layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take placements over, before the weights are loaded: experts are not moved, those on their way stay.

        *Collective where experts are on their way: every rank must call it.*

        A policy of another kind than the stored one starts without memory, in its iteration 0. Of a system that moved
        no experts only the iteration is stored.

        Raises:
            ValueError: the state of a model with other layers.
        """
        self._abandon()
        stored = {values["layer"]: values for values in state["layers"]}
        missing = [layer.number for layer in self.layers if layer.number not in stored]
        if stored and missing:
            raise ValueError(f"the stored placement has layers {sorted(stored)}, the model has {missing} too")
        for layer in self.layers:
            layer.first_step = state["iteration"]
            if values := stored.get(layer.number):
                layer.dispatcher.placement = Placement.of_slots(values["slot_E"])
                if values["policy"] == _kind(layer.policy):
                    layer.policy.load_state_dict(values["policy_state"])
                    layer.first_step = values.get("first_step", 0)  # earlier versions counted from the beginning
        self._start_iteration(state["iteration"])

    def _deciding_group(self) -> dist.ProcessGroup:
        return self._group or ranks_with_same_layers()

    def _start_iteration(self, iteration: int) -> None:
        self._iteration = iteration
        for layer in self.layers:
            layer.measured, layer.measuring_ms, layer.iteration = None, 0.0, iteration - layer.first_step

    def _travels(self, layer: LayerPlacement, update: PlacementUpdate) -> bool:
        """Whether an update's experts go in the background; the same on every rank."""
        if self._background is None:
            return False
        old, ranks = layer.dispatcher.placement, layer.dispatcher.context.communicators.size
        more = bytes_on_the_way(layer.parameters, old, update.placement, ranks)
        if self._bytes_on_the_way + more > BACKGROUND_BYTES:
            return False
        self._bytes_on_the_way += more
        return True

    def _abandon(self) -> None:
        """Experts on their way stay where they were. *Collective.*"""
        for one in self._on_the_way:
            one.travelling.abandon()
            one.layer.travels = False
        self._on_the_way, self._landed, self._bytes_on_the_way = [], [], 0

    def _send_off(self, layer: LayerPlacement, update: PlacementUpdate, optimizer: MegatronOptimizer) -> None:
        assert self._background is not None
        if self._watched is not optimizer:
            self._watched, step = optimizer, optimizer.step

            def landing_first(*arguments: Any, **named: Any) -> Any:
                self._land()
                return step(*arguments, **named)

            optimizer.step = landing_first  # type: ignore[method-assign] - the loop around it stays as it is
        group = layer.dispatcher.context.communicators.ep_group
        old, begun = layer.dispatcher.placement, time.perf_counter()
        travelling = Travelling(layer.parameters, optimizer, old, update.placement, group, self._background)
        self._on_the_way.append(_OnTheWay(layer, update, travelling, begun))
        layer.travels = True

    def _land(self) -> None:
        """Experts that travelled come to their places, between the backward passes and the optimizer's step."""
        on_the_way, self._on_the_way, self._bytes_on_the_way = self._on_the_way, [], 0
        for layer, update, travelling, begun in on_the_way:
            started = time.perf_counter()
            with layer.dispatcher.moving():
                sent_bytes = travelling.finish()
                layer.dispatcher.placement = update.placement
            layer.travels = False
            done = LayerUpdate(
                layer=layer.number,
                placement=update.placement,
                moves=travelling.old.moves_to(update.placement),
                modelled_gain_ms=update.modelled_gain_ms,
                sent_bytes=sent_bytes,
                migration_ms=(time.perf_counter() - started) * 1e3,
                hidden_ms=(started - begun) * 1e3,
            )
            self._landed.append(done)

    def _move(self, layer: LayerPlacement, update: PlacementUpdate, optimizer: MegatronOptimizer | None) -> LayerUpdate:
        started = time.perf_counter()
        dispatcher = layer.dispatcher
        old = dispatcher.placement
        with dispatcher.moving():  # a rank that dies leaves the layer unusable on all others
            sent_bytes = layer.move(optimizer, update.placement)
            dispatcher.placement = update.placement
        return LayerUpdate(
            layer=layer.number,
            placement=update.placement,
            moves=old.moves_to(update.placement),
            modelled_gain_ms=update.modelled_gain_ms,
            sent_bytes=sent_bytes,
            migration_ms=(time.perf_counter() - started) * 1e3,
        )


def _kind(policy: PlacementPolicy) -> str:
    return f"{type(policy).__module__}.{type(policy).__qualname__}"
