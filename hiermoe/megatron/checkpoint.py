"""Checkpoints of a training run by Megatron's distributed checkpointing, with experts in logical order.

Every system writes the same content under Megatron's own names, so what one saved loads in any other and in stock
Megatron. Where the experts were, and what their policies remember, is stored beside it. A checkpoint appears whole or
not at all: it is written under another name and renamed.

A training loop that may be killed at any time:

    checkpoint = latest_checkpoint(folder)
    start = load_checkpoint(checkpoint, model, optimizer, schedule, placement) if checkpoint else 0
    for step in range(start, steps):
        ...  # forward, backward, optimizer.step()
        placement.step(optimizer)
        if (step + 1) % 100 == 0:
            save_checkpoint(folder, step + 1, model, optimizer, schedule, placement, keep=2)

States of random number generators and the position in the data are the caller's.
"""

import multiprocessing
import os
import queue
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from hiermoe.megatron.checkpoint_folder import checkpoint_path, remove_old, remove_partial
from hiermoe.megatron.expert_placement import ExpertPlacement
from hiermoe.megatron.standins import cpu


def save_checkpoint(
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    placement: ExpertPlacement | None = None,
    *,
    keep: int | None = None,
) -> Path:
    """Write everything that training needs to go on. *Collective: every rank must call it.*

    Args:
        folder: of all checkpoints of the run and of nothing else, on a disk that all ranks share.
        step: finished training steps.
        model: wrapped or not.
        optimizer: its optimizer.
        schedule: its learning-rate schedule.
        placement: from `attach`; None for stock Megatron.
        keep: so many of the newest checkpoints stay; None for all.

    Returns:
        The checkpoint.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are left as they were. Where only one rank
            raises, others wait for it, so it must end.
    """
    final = checkpoint_path(folder, step)
    partial = final.with_name(f".{final.name}")
    _on_first_rank(lambda: _start(partial))
    with cpu.cuda_means_cpu(), _writers_allowed():
        state = _sharded(model, optimizer, is_loading=False)
        state |= {"iteration": step, "opt_param_scheduler": schedule.state_dict()}
        if placement is not None:
            state["placement"] = placement.state_dict()
        _write(state, partial)
    _on_first_rank(lambda: _publish(partial, final, keep))
    return final


def load_checkpoint(
    checkpoint: Path,
    model: torch.nn.Module,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    placement: ExpertPlacement | None = None,
) -> int:
    """Take over a checkpoint, whichever system wrote it. *Collective: every rank must call it.*

    Args:
        checkpoint: from `save_checkpoint`.
        model: wrapped or not.
        optimizer: its optimizer.
        schedule: its learning-rate schedule.
        placement: of the system that goes on; experts go where the checkpoint's system had them, or stay where they
            are if it moved none.

    Returns:
        Training steps that were finished.
    """
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    step = int(common["iteration"])
    if placement is not None:
        placement.load_state_dict(common.get("placement") or {"iteration": step, "layers": []})
    with cpu.cuda_means_cpu():
        state: Any = dist_checkpointing.load(_sharded(model, optimizer, is_loading=True), str(checkpoint))
    unwrapped: Any = unwrap_model(model)
    unwrapped.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.num_steps = 0  # to which Megatron adds the stored number
    schedule.load_state_dict(common["opt_param_scheduler"])
    return step


def _sharded(model: torch.nn.Module, optimizer: MegatronOptimizer, is_loading: bool) -> dict[str, Any]:
    unwrapped: Any = unwrap_model(model)
    shards = unwrapped.sharded_state_dict()
    return {"model": shards, "optimizer": optimizer.sharded_state_dict(shards, is_loading=is_loading)}


def _start(partial: Path) -> None:
    """An empty folder to write to; what killed runs left behind goes."""
    remove_partial(partial.parent)
    partial.mkdir(parents=True)


def _write(state: dict[str, Any], partial: Path) -> None:
    """Let Megatron write. *Collective.*

    Raises:
        OSError: with the reason.
    """
    try:
        dist_checkpointing.save(state, str(partial))
    except CheckpointException as error:  # raised on every rank, but only rank 0 knows what happened
        reasons = [f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items()]
        _on_first_rank(lambda: _fail(partial, "; ".join(reasons)))
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot write the checkpoint {partial}: {error}") from error


def _fail(partial: Path, reason: str) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    raise OSError(f"cannot write the checkpoint {partial}: {reason}")


def _publish(partial: Path, final: Path, keep: int | None) -> None:
    """Give a whole checkpoint its name, once it is on disk."""
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    if final.exists():  # of an earlier run that got further than the checkpoint from which this one resumed
        replaced = final.with_name(f".{final.name}.replaced")
        final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced)
    else:
        partial.rename(final)
    _flush(final.parent)
    if keep is not None:
        remove_old(final.parent, keep)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _on_first_rank(action: Callable[[], object]) -> None:
    """Run something on rank 0 while all others wait. *Collective: every rank must call it.*

    Raises:
        OSError: on every rank, if rank 0 had one.
    """
    reason: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            reason = [str(error)]
    dist.broadcast_object_list(reason, src=0)
    if reason[0] is not None:
        raise OSError(reason[0])


@contextmanager
def _writers_allowed() -> Iterator[None]:
    """Lets Megatron write in any rank, and leave no process behind.

    Its writer starts processes, which multiprocessing forbids to ranks started as daemons. It collects their results by
    a server process, which asynchronous saving alone needs, and which would outlive a rank that is killed.
    """
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    daemon, server = settings.get("daemon", False), filesystem_async._results_queue
    settings["daemon"], filesystem_async._results_queue = False, queue.Queue()
    try:
        yield
    finally:
        settings["daemon"], filesystem_async._results_queue = daemon, server
