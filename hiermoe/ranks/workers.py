"""Processes that simulate, one core each."""

import ctypes
import signal

import torch

from hiermoe.ranks.launch import end_with_parent

_M_MMAP_THRESHOLD = -3  # as in malloc.h
_LARGE_BLOCK_BYTES = 2**22


def start_worker() -> None:
    """One core a worker, and none outlives the process that it works for, however that ends."""
    torch.set_num_threads(1)
    _give_large_blocks_back()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    end_with_parent()


def _give_large_blocks_back() -> None:
    """Let memory that large tensors leave go back to the system.

    glibc would keep it, and put the small ones that stay (counts) into its middle: in worlds of thousands of GPUs a
    worker grew to twenty times what it held.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc alone
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
