"""How much memory there is; a container's limit counts. Imports no torch."""

import sys
from pathlib import Path

import psutil

_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")  # of a container


def total_bytes() -> int:
    """What this machine has."""
    return min(psutil.virtual_memory().total, _limit() or sys.maxsize)


def free_bytes() -> int:
    """What a process can still get."""
    free, limit = psutil.virtual_memory().available, _limit()
    return free if limit is None else min(free, max(limit - int(_USED.read_text()), 0))


def _limit() -> int | None:
    """A container's; None where there is none."""
    said = _LIMIT.read_text().strip() if _LIMIT.exists() else "max"
    return None if said == "max" else int(said)
