"""Checkpoints of a training run by Megatron's distributed checkpointing, with experts in logical order.

Every system writes the same content, so what one saved loads in any other and in stock Megatron. The placement is
stored beside it. A checkpoint appears whole or not at all: it is written under another name and renamed.
"""

import multiprocessing
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from hiermoe.megatron import cpu
from hiermoe.megatron.placement import ExpertPlacement

_PREFIX = "step-"


def save_checkpoint(
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    placement: ExpertPlacement | None = None,
) -> Path:
    """Write everything that training needs to go on. *Collective: every rank must call it.*

    Args:
        folder: of all checkpoints of the run, on a disk that all ranks share.
        step: finished training steps.
        model: not wrapped.
        optimizer: its optimizer.
        schedule: its learning-rate schedule.
        placement: where experts are; None for stock Megatron.

    Returns:
        The checkpoint.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are left as they were.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    partial = folder / f".{final.name}"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    with cpu.cuda_means_cpu(), _children_allowed():
        state = _sharded(model, optimizer, is_loading=False)
        state |= {"step": step, "schedule": schedule.state_dict()}
        if placement is not None:
            state["placement"] = placement.state_dict()
        dist_checkpointing.save(state, str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    dist.barrier()
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; None if there is none."""
    return max(folder.glob(f"{_PREFIX}*"), default=None)


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
        model: not wrapped.
        optimizer: its optimizer.
        schedule: its learning-rate schedule.
        placement: of the system that goes on; experts go where the checkpoint's system had them.

    Returns:
        Training steps that were finished.
    """
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    if placement is not None and "placement" in common:
        placement.load_state_dict(common["placement"])
    with cpu.cuda_means_cpu():
        state = dist_checkpointing.load(_sharded(model, optimizer, is_loading=True), str(checkpoint))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(common["schedule"])
    return int(common["step"])


def _sharded(model: torch.nn.Module, optimizer: MegatronOptimizer, is_loading: bool) -> dict[str, Any]:
    shards = model.sharded_state_dict()  # type: ignore[operator] - every Megatron module has it
    return {"model": shards, "optimizer": optimizer.sharded_state_dict(shards, is_loading=is_loading)}


@contextmanager
def _children_allowed() -> Iterator[None]:
    """Megatron's writer starts processes, which multiprocessing forbids to ranks started as daemons."""
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    daemon = settings.get("daemon", False)
    settings["daemon"] = False
    try:
        yield
    finally:
        settings["daemon"] = daemon
