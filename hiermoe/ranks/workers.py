"""Processes that simulate, one core each."""

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch

from hiermoe.ranks.server import STOPPED, end_with_parent, fork_server, watched
from hiermoe.records.interrupts import held

_M_MMAP_THRESHOLD = -3  # as in malloc.h
_LARGE_BLOCK_BYTES = 2**22


@contextmanager
def worker_pools(number: int, processes: int, advice: str) -> Iterator[list[ProcessPoolExecutor]]:
    """Pools of processes that simulate, for as long as the context is entered.

    Args:
        number: of pools.
        processes: of each.
        advice: what takes less memory, or what is kept; for the message.

    Raises:
        ValueError: one of them was killed, or stopped.
        ServerGone: the process that they come from was.
    """
    context = fork_server()
    with watched() as watch:
        pools = [ProcessPoolExecutor(processes, context, _start_worker) for _ in range(number)]
        try:
            with held():  # one that was made and is not told what to do would complain
                for future in [pool.submit(os.getpid) for pool in pools for _ in range(processes)]:
                    future.result()
            watch.all_started()
            yield pools
        except BrokenProcessPool as error:
            cause = f"was killed, most likely for want of memory: {number * processes} of them ran"
            raise ValueError(f"a simulating process {STOPPED if watch.stopped else cause}{advice}") from error
        finally:
            for pool in pools:
                pool.shutdown(wait=False, cancel_futures=True)


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
