"""A run is named by its content: its resolved configuration and the source files that produce its numbers."""

import hashlib
import json
import socket
from functools import lru_cache
from pathlib import Path
from typing import Any

from hiermoe.records.project import PROJECT_ROOT

# What simulated numbers are made by. The records' schema belongs to it: old columns must not be read as new ones.
SIMULATED_SOURCES = (
    "hiermoe/records/schema.py",
    "hiermoe/routing/*.py",
    "hiermoe/topology/*.py",
    "hiermoe/planner/**/*.py",
    "hiermoe/megatron/model_config.py",
    "hiermoe/backends/bounds.py",
    "hiermoe/backends/simulated.py",
    "hiermoe/backends/synthetic_timings.py",
    "hiermoe/backends/walk.py",
    "hiermoe/backends/workload.py",
    "hiermoe/harness/config.py",
    "baselines/*.py",
)
# What measured numbers are made by.
MEASURED_SOURCES = (*SIMULATED_SOURCES, "hiermoe/backends/**/*.py", "hiermoe/dispatch/*.py", "hiermoe/megatron/*.py")


def run_id(
    config: dict[str, Any], inputs: tuple[Path, ...] = (), *, measured: bool = False, on_this_host: bool = True
) -> str:
    """Name of a run.

    Args:
        config: the resolved configuration, without what does not change numbers (logging).
        inputs: files that the run reads; their content counts, not their path. A missing file counts as missing.
        measured: whether its numbers are measured. Then the host counts too, and all code that runs.
        on_this_host: whether they are measured here; the nodes of a cluster are as good as each other, and which of
            them an allocation begins with does not count. The cluster's constants do, in ``config``.

    Returns:
        ``<system>-<model>-<16 hexadecimal digits>``.
    """
    content = {
        "config": config,
        "code": code_digest(MEASURED_SOURCES if measured else SIMULATED_SOURCES),
        "inputs": [_file_digest(path, path.stat().st_mtime_ns) if path.exists() else None for path in inputs],
    }
    if measured and on_this_host:
        content["host"] = socket.gethostname()
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return f"{config['system']['name']}-{config['model']['name']}-{digest}"


@lru_cache(maxsize=2)
def code_digest(patterns: tuple[str, ...]) -> str:
    """Hash of the source files that produce numbers.

    Args:
        patterns: of their paths below the project's root.
    """
    digest = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(PROJECT_ROOT.glob(pattern)):
            digest.update(path.relative_to(PROJECT_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _file_digest(path: Path, modified_ns: int) -> str:
    """Content hash; the modification time only keys the cache."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
