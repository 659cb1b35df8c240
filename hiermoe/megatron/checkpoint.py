"""Checkpoints of a training run by Megatron's distributed checkpointing, with experts in logical order.

Every system writes the same content under Megatron's own names, so what one saved loads in any other and in stock
Megatron. Where the experts were, and what their policies remember, is stored beside it. A checkpoint appears whole or
not at all: it is written under another name and renamed. It has a checksum of every file, and is loaded only if it is
what was written.

A training loop that may be killed at any time:

    start = load_latest(folder, model, optimizer, schedule, placement)  # 0 where there is no checkpoint
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
import sys
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

from hiermoe.megatron.checkpoint_folder import (
    check_files,
    checkpoint_path,
    file_names,
    newest_first,
    remove_old,
    remove_partial,
    write_checksums,
)
from hiermoe.megatron.expert_placement import ExpertPlacement
from hiermoe.megatron.standins import cpu
from hiermoe.records.checksums import Damaged, digest_of

# State of the distributed optimizer by parameter, not by its place in a buffer: where experts have moved, only a
# parameter says whose it is.
_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


def save_checkpoint(
    folder: Path,
    step: int,
    model: torch.nn.Module | list[torch.nn.Module],
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
        model: wrapped or not, or the list of its pipeline chunks on this rank.
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
    digests = _digests(partial)
    _on_first_rank(lambda: _publish(partial, final, keep, step, digests))
    return final


def load_latest(
    folder: Path,
    model: torch.nn.Module | list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    placement: ExpertPlacement | None = None,
) -> int:
    """Take over the newest whole checkpoint of a folder. *Collective: every rank must call it.*

    Of one that is damaged rank 0 says so, and the one before it is taken.

    Args:
        folder: of all checkpoints of the run.
        model: as `load_checkpoint` has it, like all others.
        optimizer: of the model.
        schedule: of the learning rate.
        placement: of the experts.

    Returns:
        Training steps that were finished; 0 if there is no checkpoint.

    Raises:
        Damaged: there are checkpoints, and none is whole.
    """
    found: list[list[Path]] = [newest_first(folder)]
    dist.broadcast_object_list(found, src=0)
    for number, checkpoint in enumerate(found[0], start=1):
        try:
            return load_checkpoint(checkpoint, model, optimizer, schedule, placement)
        except Damaged as error:
            if number == len(found[0]):
                raise
            if dist.get_rank() == 0:
                print(f"{error}; the checkpoint before it is taken", file=sys.stderr, flush=True)
    return 0


def load_checkpoint(
    checkpoint: Path,
    model: torch.nn.Module | list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    placement: ExpertPlacement | None = None,
) -> int:
    """Take over a checkpoint, whichever system wrote it. *Collective: every rank must call it.*

    Args:
        checkpoint: from `save_checkpoint`.
        model: wrapped or not, or the list of its pipeline chunks on this rank.
        optimizer: its optimizer.
        schedule: its learning-rate schedule.
        placement: of the system that goes on; experts go where the checkpoint's system had them, or stay where they
            are if it moved none.

    Returns:
        Training steps that were finished.

    Raises:
        Damaged: on every rank: it is not what was written. Nothing has been taken over.
        ValueError: it is of another model.
    """
    _check(checkpoint)
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    step = int(common["iteration"])
    if placement is not None:
        placement.load_state_dict(common.get("placement") or {"iteration": step, "layers": []})
    with cpu.cuda_means_cpu():
        try:
            state: Any = dist_checkpointing.load(_sharded(model, optimizer, is_loading=True), str(checkpoint))
        except CheckpointException as error:  # names ranks alone
            reason = next((str(failure) for failure, _ in error.failures.values()), str(error))
            raise ValueError(f"{checkpoint} does not fit this model: {reason.splitlines()[0]}") from error
    for name, chunk in _chunks(model).items():
        chunk.load_state_dict(state[name])
    with cpu.cuda_means_cpu():
        optimizer.load_state_dict(state["optimizer"])
    schedule.num_steps = 0  # to which Megatron adds the stored number
    schedule.load_state_dict(common["opt_param_scheduler"])
    return step


def _sharded(
    model: torch.nn.Module | list[torch.nn.Module], optimizer: MegatronOptimizer, is_loading: bool
) -> dict[str, Any]:
    shards = {name: chunk.sharded_state_dict(metadata={**_FORMAT}) for name, chunk in _chunks(model).items()}
    of_optimizer = shards["model"] if len(shards) == 1 else shards
    state: Any = optimizer.sharded_state_dict(of_optimizer, is_loading=is_loading, metadata={**_FORMAT})
    return {**shards, "optimizer": state}


def _chunks(model: torch.nn.Module | list[torch.nn.Module]) -> dict[str, Any]:
    """Unwrapped, by the names that Megatron-LM gives them in a checkpoint."""
    unwrapped: Any = unwrap_model(model)
    if not isinstance(unwrapped, list) or len(unwrapped) == 1:
        return {"model": unwrapped[0] if isinstance(unwrapped, list) else unwrapped}
    return {f"model{i}": chunk for i, chunk in enumerate(unwrapped)}


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
    """Say why, with what the disk says itself, which not every version of Megatron passes on."""
    refusal = _refusal(partial)
    shutil.rmtree(partial, ignore_errors=True)
    raise OSError(f"cannot write the checkpoint {partial}: " + "; ".join(filter(None, [refusal, reason])))


def _refusal(folder: Path) -> str:
    """Why a file of a mebibyte cannot be written in a folder; empty where it can."""
    try:
        (folder / ".probe").write_bytes(bytes(2**20))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _digests(partial: Path) -> dict[str, str]:
    """Checksums of all files, each rank's of its share. *Collective.*

    Raises:
        OSError: on every rank, if one cannot read its share.
    """
    names = [file_names(partial)]
    dist.broadcast_object_list(names, src=0)
    own: dict[str, str] | Damaged
    try:
        own = {name: digest_of(partial, name) for name in names[0][dist.get_rank() :: dist.get_world_size()]}
    except Damaged as error:
        own = error
    shares = _gathered(own)
    for share in shares:
        if isinstance(share, Damaged):
            raise OSError(f"cannot write the checkpoint {partial}: {share.why}")
    return {name: digest for share in shares for name, digest in share.items()}


def _check(checkpoint: Path) -> None:
    """Compare all files with their checksums, each rank its share. *Collective.*

    Raises:
        Damaged: on every rank.
    """
    why = None
    try:
        check_files(checkpoint, dist.get_rank(), dist.get_world_size())
    except Damaged as error:
        why = error.why
    whys = [each for each in _gathered(why) if each is not None]
    if whys:
        raise Damaged(checkpoint, whys[0])


def _gathered(own: Any) -> list[Any]:
    """What every rank has. *Collective.*"""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def _publish(partial: Path, final: Path, keep: int | None, step: int, digests: dict[str, str]) -> None:
    """Give a whole checkpoint its name, once it is on disk."""
    write_checksums(partial, step, digests)
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
