"""The largest memory that a rank used during an iteration."""

from pathlib import Path

import torch

_CLEAR_PEAK = "5"  # man 5 proc: /proc/pid/clear_refs


class PeakMemory:
    """Of the CUDA allocator, or on CPU of the process (resident set; shared pages count in each rank)."""

    def __init__(self, device: str) -> None:
        """Watch a device: cpu or cuda."""
        self._on_cuda = device == "cuda"

    def reset(self) -> None:
        """Forget the peak so far."""
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)

    def peak_bytes(self) -> int:
        """Largest use since `reset`."""
        if self._on_cuda:
            return torch.cuda.max_memory_allocated()
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("/proc/self/status has no VmHWM")
