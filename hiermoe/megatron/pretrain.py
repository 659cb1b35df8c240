"""Experts that move in Megatron-LM's own training loop, `megatron.training.pretrain`.

Two lines of `pretrain_gpt.py`, before it calls ``pretrain``:

    from hiermoe.megatron.pretrain import place_experts

    place_experts("hiermoe", "my_cluster")

Megatron's flags, data and checkpoints stay as they are. Every run begins with experts at home, a resumed one too, and
they are there in every checkpoint. Iterations whose update Megatron skips count like any other: their routing was
measured all the same.
"""

import functools
import importlib
import inspect
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from hiermoe.dispatch.communicators import reduced
from hiermoe.megatron.attach import attach
from hiermoe.megatron.expert_placement import ExpertPlacement
from hiermoe.megatron.layer_placement import LayerUpdate
from hiermoe.megatron.pipeline_stage import is_stage, ranks_with_same_layers
from hiermoe.policies.protocol import StaticPolicy
from hiermoe.policies.system import SystemConfig
from hiermoe.topology.cluster import Cluster

_LOOP = "megatron.training.training"
# What is wrapped there, and the arguments that are read; everything else goes through as it is.
_SETUP, _STEP, _SAVE = "setup_model_and_optimizer", "train_step", "save_checkpoint"
_WRAPPED = {_SETUP: (), _STEP: ("optimizer",), _SAVE: ("optimizer",)}
_REFUSED = {
    "adlr_autoresume": "it saves checkpoints behind the training loop, with experts where they are",
    "optimizer_cuda_graph": "a captured step of the optimizer has no test",
    "perform_rl_step": "reinforcement learning has no test",
}
_MARK = "_places_experts"


class Moved(NamedTuple):
    """What moved in one layer after one iteration.

    Attributes:
        layer: Megatron's layer number.
        experts: that changed their slot.
        modelled_gain_ms: as in `PlacementUpdate`.
        sent_bytes: of all ranks.
    """

    layer: int
    experts: int
    modelled_gain_ms: float | None
    sent_bytes: int


class IterationTimes:
    """What an update of placements has realised: iterations before it against those until the next one.

    By this rank's clock, medians; the first iteration, which sets much up, does not count. Where loads drift, or
    others share the network, that is in it too.
    """

    def __init__(self) -> None:
        self._is_first = True
        self._since: list[float] = []
        self._before: float | None = None

    def add(self, ms: float) -> None:
        """One iteration, from forward to the optimizer's step."""
        if not self._is_first:
            self._since.append(ms)
        self._is_first = False

    def moved(self) -> float | None:
        """An update follows: what the one before it has saved, ms an iteration; None where nobody knows."""
        now = statistics.median(self._since) if self._since else None
        gain = None if now is None or self._before is None else self._before - now
        self._before, self._since = now, []
        return gain


def place_experts(system: SystemConfig | str, cluster: Cluster | str) -> None:
    """Make `pretrain` attach a system to its model and move experts after every iteration. Once in a process.

    It attaches after the model is built and a checkpoint is loaded, as `hiermoe.megatron.attach.attach` does. Whenever
    experts have moved, rank 0 prints a line and TensorBoard and W&B get scalars, where Megatron has them on.

    Args:
        system: a system, or the name of one in conf/system/.
        cluster: hierarchy and constants of the cluster that the ranks run on, or the name of one in conf/cluster/.

    Raises:
        ValueError: no such system or cluster.
        RuntimeError: Megatron's training loop is missing or not one that this module knows, or has a system already.
    """
    system = SystemConfig.named(system) if isinstance(system, str) else system
    cluster = Cluster.named(cluster) if isinstance(cluster, str) else cluster
    loop = _training_loop()
    if hasattr(getattr(loop, _SETUP), _MARK):
        raise RuntimeError("place_experts has been called already: one system in a process")
    placed = _Placed(system, cluster)
    for name, wrap in {_SETUP: placed.setup, _STEP: placed.train_step, _SAVE: placed.save}.items():
        stock = getattr(loop, name)
        wrapped = functools.wraps(stock)(functools.partial(wrap, stock))
        setattr(wrapped, _MARK, True)
        setattr(loop, name, wrapped)


class _Placed:
    """The system that `pretrain` trains with; its methods stand in for the loop's functions."""

    def __init__(self, system: SystemConfig, cluster: Cluster) -> None:
        self._system, self._cluster = system, cluster
        self._placement: ExpertPlacement | None = None
        self._moves = not isinstance(system.build_policy(), StaticPolicy)
        self._iterations = IterationTimes()

    def setup(self, stock: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Build and load the model, then attach."""
        args, self._placement = _args(), None
        for name, reason in _REFUSED.items():
            if getattr(args, name, False):
                raise ValueError(f"{name} is not supported where experts move: {reason}")
        result = stock(*arguments, **named)
        limit = timedelta(minutes=args.distributed_timeout_minutes)
        self._placement = attach(result[0], self._system, self._cluster, timeout=limit)
        self._placement.load_state_dict({"iteration": args.iteration, "layers": []})
        return result

    def train_step(self, stock: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """One iteration; experts move if the optimizer came to its step, and not if Megatron is about to exit."""
        started = time.perf_counter()
        result = stock(*arguments, **named)
        self._iterations.add((time.perf_counter() - started) * 1e3)
        _, _, _, should_exit, *_ = result
        if self._placement is not None and not should_exit:
            optimizer = _argument("optimizer", stock, arguments, named)
            updates = self._placement.step(optimizer)
            if self._moves:  # else not even asked for
                _report(self._placement, updates, _args().curr_iteration + 1, self._iterations)
        return result

    def save(self, stock: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Save with experts at home, and bring them back.

        Megatron's default format keeps what the distributed optimizer owns by its place in memory, not by name.
        """
        optimizer = _argument("optimizer", stock, arguments, named)
        if self._placement is None or optimizer is None:
            return stock(*arguments, **named)
        away = {layer.number: layer.dispatcher.placement for layer in self._placement.layers}
        self._placement.go_home(optimizer)
        result = stock(*arguments, **named)
        self._placement.move_to(away, optimizer)
        return result


def _training_loop() -> Any:
    """Megatron's module, which has all that is wrapped.

    Raises:
        RuntimeError: it is missing, or lacks something.
    """
    try:
        loop = importlib.import_module(_LOOP)
    except ImportError as error:
        raise RuntimeError(
            f"{_LOOP} cannot be imported ({error}): megatron-core has it from 0.19 on, before that a checkout of "
            "Megatron-LM in PYTHONPATH"
        ) from error
    for name, needed in _WRAPPED.items():
        known = inspect.signature(getattr(loop, name)).parameters if hasattr(loop, name) else {}
        if not hasattr(loop, name) or not set(needed) <= set(known):
            raise RuntimeError(f"{_LOOP} of this version has no {name}({', '.join(needed)}): not supported")
    return loop


def _args() -> Any:
    return importlib.import_module("megatron.training.global_vars").get_args()


def _argument(name: str, function: Callable[..., Any], arguments: Any, named: dict[str, Any]) -> Any:
    return inspect.signature(function).bind(*arguments, **named).arguments.get(name)


def _report(placement: ExpertPlacement, updates: list[LayerUpdate], iteration: int, iterations: IterationTimes) -> None:
    """Print and write what moved. *Collective: every rank must call it.*"""
    moved, planning_ms, migration_ms = _over_ranks(placement, updates)
    if not moved:
        return
    realised_ms = iterations.moved()
    gains = [one.modelled_gain_ms for one in moved if one.modelled_gain_ms is not None]
    scalars: dict[str, float] = {
        "moved_experts": sum(one.experts for one in moved),
        "sent_bytes": sum(one.sent_bytes for one in moved),
        "planning_ms": planning_ms,
        "migration_ms": migration_ms,
    }
    if gains:
        scalars["modelled_gain_ms"] = sum(gains)
    if realised_ms is not None:
        scalars["realised_gain_ms"] = realised_ms
    if dist.get_rank() == 0:
        where = ", ".join(f"{one.experts} in layer {one.layer}" for one in moved)
        gain = f"modelled gain {sum(gains):.3f} ms a step" if gains else "no modelled gain"
        if realised_ms is not None:
            gain += f" | realised by the update before: {realised_ms:.3f} ms"
        cost = f"planning {planning_ms:.1f} ms, migration {migration_ms:.1f} ms, {scalars['sent_bytes']} bytes sent"
        print(f" experts moved after iteration {iteration}: {where} | {gain} | {cost}", flush=True)
    writers = importlib.import_module("megatron.training.global_vars")
    board, wandb = writers.get_tensorboard_writer(), writers.get_wandb_writer()
    named = {f"hiermoe/{name}": value for name, value in scalars.items()}
    if board:
        for name, value in named.items():
            board.add_scalar(name, value, iteration)
    if wandb:
        wandb.log(named, iteration)


def _over_ranks(placement: ExpertPlacement, updates: list[LayerUpdate]) -> tuple[list[Moved], float, float]:
    """What moved on all ranks and stages, and the milliseconds that the slowest rank planned and moved."""
    group = ranks_with_same_layers()
    moved: list[Moved] = []
    times = torch.zeros(2, dtype=torch.float64)
    if updates:  # which are the same on all ranks of the group
        sent = reduced(torch.tensor([one.sent_bytes for one in updates]), dist.ReduceOp.SUM, group)
        own = [placement.planning_ms, placement.migration_ms + placement.landing_ms]
        times = reduced(torch.tensor(own, dtype=torch.float64), dist.ReduceOp.MAX, group)
        moved = [
            Moved(one.layer, one.moved_experts, one.modelled_gain_ms, sent_bytes)
            for one, sent_bytes in zip(updates, sent.tolist(), strict=True)
        ]
    if is_stage():
        stages: Any = parallel_state.get_pipeline_model_parallel_group()
        of_stages: list[Any] = [None] * dist.get_world_size(stages)
        dist.all_gather_object(of_stages, (moved, times), group=stages)
        moved = sorted(one for stage, _ in of_stages for one in stage)
        times = torch.stack([one for _, one in of_stages]).amax(0)
    planning_ms, migration_ms = times.tolist()
    return moved, planning_ms, migration_ms
