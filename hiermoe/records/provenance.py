"""What made a number: code, versions, machine, command."""

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import psutil

from hiermoe.records.project import CODE, IS_CHECKOUT

PACKAGES = ("hiermoe", "torch", "megatron-core", "hydra-core", "numpy", "pandas", "pyarrow", "scipy", "submitit")
# Variables that say which allocation this is and how its ranks reach each other.
_ALLOCATION = ("SLURM_JOB_", "SLURM_NTASKS", "SLURM_RESTART_COUNT", "NCCL_", "GLOO_", "UCX_", "CUDA_VISIBLE_DEVICES")
_CARD_FIELDS = "index,name,uuid,driver_version,vbios_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"


def collect() -> dict[str, Any]:
    """Time, command, commit, versions and machine, as JSON-ready values."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"{sys.argv[0]} {shlex.join(sys.argv[1:])}".strip(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version(), **_versions()},
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "host": platform.node(),
        "allocation": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_ALLOCATION)},
        "gpus": _gpus(),
    }


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


@lru_cache(maxsize=1)
def _gpus() -> dict[str, str] | None:
    """Driver, NCCL, topology and clocks of this host's GPUs, as nvidia-smi says; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    queries = {
        "cards": (f"--query-gpu={_CARD_FIELDS}", "--format=csv"),
        "topology": ("topo", "-m"),
        "clocks": ("-q", "-d", "CLOCK"),
    }
    nccl = nccl_version()
    loaded = "torch was built without NCCL" if nccl is None else ".".join(map(str, nccl))
    return {name: _nvidia_smi(*arguments) for name, arguments in queries.items()} | {"nccl": loaded}


def _nvidia_smi(*arguments: str) -> str:
    """What it prints, or why it does not."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed: {error}"
    return done.stdout if done.returncode == 0 else f"nvidia-smi failed: {(done.stdout + done.stderr).strip()}"


def nccl_version() -> tuple[int, int, int] | None:
    """Of the NCCL that this process has loaded, which one that was preloaded decides; None where torch has none."""
    import torch  # seconds; only where there is a GPU
    import torch.cuda.nccl

    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return None
    code = ctypes.c_int()
    try:
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(code))
    except (OSError, AttributeError):  # linked into torch, whose headers then tell
        major, minor, patch = torch.cuda.nccl.version()[:3]
        return major, minor, patch
    return code.value // 10000, code.value // 100 % 100, code.value % 100


@lru_cache(maxsize=4)  # what a process has loaded stays what it runs
def _git(*arguments: str) -> str | None:
    """What git says of the checkout; None for an installed package, which may lie inside somebody else's."""
    if not IS_CHECKOUT:
        return None
    try:
        command = ["git", "-C", str(CODE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
