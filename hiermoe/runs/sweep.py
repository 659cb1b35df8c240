"""Runs of sweeps, on all cores, and resumed."""

import ctypes
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from hiermoe.ranks.server import STOPPED, Watch, end_with_parent, fork_server, preload, watched
from hiermoe.records.interrupts import held
from hiermoe.records.keep import Outcome, kept
from hiermoe.records.store import RunStore
from hiermoe.runs.execute import execute
from hiermoe.runs.run_config import RunConfig

_M_MMAP_THRESHOLD = -3  # as in malloc.h
_LARGE_BLOCK_BYTES = 2**22


def run_all(
    configs: Iterable[RunConfig],
    workers: int,
    finished: Callable[[Outcome], None],
    store: RunStore | None = None,
) -> list[Outcome]:
    """Run configurations in worker processes, each on one core; those with a record are skipped.

    Runs that share their routing go to the same worker one after another, so that it is made once: each worker is a
    pool of its own, as a pool gives a run to whichever of its processes is free.

    Args:
        configs: what to run; the same run may occur twice and is run once.
        workers: processes.
        finished: called in this process with every outcome.
        store: where records are.

    Returns:
        All outcomes.

    Raises:
        ValueError: a worker was killed.
        ServerGone: the process that workers come from was.
        Exception: whatever a worker could not turn into a failed record, e.g. a full disk; nothing further is started.
    """
    store = store or RunStore()
    unique = {config.run_id: config for config in configs}
    groups: dict[str, list[RunConfig]] = {}
    outcomes = []
    for run_id, config in unique.items():
        if (outcome := kept(run_id, store)) is not None:
            outcomes.append(outcome)
            finished(outcome)
        else:
            groups.setdefault(config.routing_key, []).append(config)
    if not groups:
        return outcomes
    preload("hiermoe.runs.sweep")
    queue = sorted(groups.values(), key=len, reverse=True)
    context = fork_server()
    with watched() as watch:
        for outcome in _in_pools(
            queue, [ProcessPoolExecutor(1, context, _start_worker) for _ in queue[:workers]], store, watch
        ):
            outcomes.append(outcome)
            finished(outcome)
    return outcomes


def _in_pools(
    queue: list[list[RunConfig]], pools: list[ProcessPoolExecutor], store: RunStore, watch: Watch
) -> Iterator[Outcome]:
    """Outcomes as they come; the pools end with them."""
    left = {pool: queue.pop(0) for pool in pools}
    try:
        with held():  # a process that was made and is not told what to do would complain
            running = {pool.submit(execute, left[pool].pop(0), store): pool for pool in pools}
        watch.all_started()
        watch.pids += [process.pid or 0 for process in multiprocessing.active_children()]
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                pool = running.pop(future)
                yield future.result()
                if not left[pool]:
                    left[pool] = queue.pop(0) if queue else _half_of(max(left.values(), key=len))
                if left[pool]:
                    running[pool.submit(execute, left[pool].pop(0), store)] = pool
    except BrokenProcessPool as error:
        cause = f"was killed, most likely for want of memory: {len(pools)} of them ran, --workers 1 takes less"
        raise ValueError(
            f"a simulating process {STOPPED if watch.stopped else cause}. Finished runs are kept"
        ) from error
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)


def _half_of(group: list[RunConfig]) -> list[RunConfig]:
    """Take the second half of what another worker has left."""
    kept = (len(group) + 1) // 2
    taken, group[kept:] = group[kept:], []
    return taken


def _start_worker() -> None:
    """One core a worker, and none outlives the process that it works for, however that ends."""
    torch.set_num_threads(1)
    _give_large_blocks_back()
    end_with_parent()


def _give_large_blocks_back() -> None:
    """Let memory that large tensors leave go back to the system.

    glibc would keep it, and put the small ones that stay (counts) into its middle: in worlds of thousands of GPUs a
    worker grew to twenty times what it held.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc alone
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
