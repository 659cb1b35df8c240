"""How much memory ranks on this machine take. Pure: imports no torch.

Ranks come from a fork server and share what it has imported. What a rank has for itself was measured (its private
pages, at their peak; torch 2.13 and Megatron-Core 0.16.1 on CPU, four and eight ranks of `hiermoe run measure=replay
system=hd2`): 30 MB with 16 tokens a rank; after a few iterations of 256, 512 and 1024 tokens 205, 400 and 660 MB, 20
to 23 times the bytes of the rows that a rank receives, K copies of T tokens; and after 34 iterations of 1024 tokens
1164 MB in the mean of 8 ranks, 34 times, since what is freed in pieces is not given back. Every run measures it anew
(``peak_memory_bytes`` of its record, which counts shared pages too).
"""

import os
from pathlib import Path

from hiermoe.records.free_memory import free_bytes

SHARED_BYTES = 340 * 10**6  # of the fork server
OWN_BYTES = 35 * 10**6  # of a rank that has joined its group
COPIES = 34  # of the rows that a rank receives: in and out, forward and backward, and what checks them
RANKS_PER_CORE = 4  # that a default starts; more only wait for each other

_KILLS = Path("/proc/vmstat")


def cores() -> int:
    """That the scheduler lets this process use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bytes_of_rank(tokens_per_rank: int, topk: int, row_bytes: int) -> int:
    """What a rank that replays routing has for itself.

    Args:
        tokens_per_rank: T.
        topk: K.
        row_bytes: M * v.
    """
    return OWN_BYTES + COPIES * tokens_per_rank * topk * row_bytes


def ranks_that_fit(free: int, each: int) -> int:
    """How many ranks there is memory for."""
    return max((free - SHARED_BYTES) // each, 0)


def check_memory(num_ranks: int, each: int, instead: str) -> None:
    """Refuse more ranks than there is memory for; to be called before the first of them starts.

    Args:
        num_ranks: to be started on this machine.
        each: what one of them has for itself.
        instead: what takes less.

    Raises:
        ValueError: they need more than is free.
    """
    free, needed = free_bytes(), SHARED_BYTES + num_ranks * each
    if needed > free:
        raise ValueError(
            f"{num_ranks} ranks need {needed / 1e9:.1f} GB of memory ({each / 1e6:.0f} MB each, and what they share), "
            f"{free / 1e9:.1f} GB are free, for {ranks_that_fit(free, each)}: {instead}"
        )


def kills_for_memory() -> int | None:
    """How many processes the kernel has killed for memory since it booted; None where it does not say."""
    lines = _KILLS.read_text().splitlines() if _KILLS.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
