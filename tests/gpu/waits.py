"""Where the host waits for the GPU."""

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch


def host_waits(work: Callable[[], None]) -> Counter[str]:
    """Lines at which the host waits for the GPU, and how often, as torch's sync debug mode tells."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in said if "synchronizing CUDA" in str(w.message))
