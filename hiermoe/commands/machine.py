"""What is on this machine: facts for `hiermoe doctor`, gathered without judging them.

Every function looks at one thing and raises what it runs into; the caller shows that as a check that failed. Commands
of others get a time limit, since a broken driver or an unreachable scheduler may hang.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from hiermoe.records.project import CLUSTERS, PROJECT_ROOT, RUNS

COMMAND_SECONDS = 5.0
IMPORT_SECONDS = 10.0

# What `make reproduce` walks through with routing=recorded.
SHIPPED_TRACES = ("qwen3_30b_a3b_e128", "deepseek_v3_e256")

# Megatron-Core's optional back ends, and the modules they are found by.
BACK_ENDS = {
    "transformer-engine": "transformer_engine",
    "grouped_gemm": "grouped_gemm",
    "apex": "apex",
    "flash-attn": "flash_attn",
}

_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")
_IMPORT_MEGATRON = (
    "import warnings; warnings.simplefilter('ignore'); "
    "from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher"
)


@dataclass(frozen=True)
class Packages:
    """Python and packages.

    Attributes:
        python: version that runs this.
        python_range: what pyproject.toml asks for.
        ranges: for each package that the project needs, the requirement as pyproject.toml has it.
        installed: for each of them its version, None where it is not installed.
        tested: the versions of constraints.txt.
    """

    python: str
    python_range: str
    ranges: dict[str, str]
    installed: dict[str, str | None]
    tested: dict[str, str]


@dataclass(frozen=True)
class Megatron:
    """Megatron-Core.

    Attributes:
        version: None where it is not installed.
        import_error: last line of what its import says; None where it works.
        back_ends: which of `BACK_ENDS` are installed.
    """

    version: str | None
    import_error: str | None
    back_ends: tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """Cores that this process may use, and memory that is free for it, in bytes."""

    cores: int
    free_bytes: int


@dataclass(frozen=True)
class Namespaces:
    """Emulated links.

    Attributes:
        refused: why they cannot be set up; None where a network was set up and taken down again.
        wanted_bytes_per_s: rate that the trial's link was given.
        found_bytes_per_s: rate that the kernel says its token bucket has.
    """

    refused: str | None
    wanted_bytes_per_s: int = 0
    found_bytes_per_s: int = 0


@dataclass(frozen=True)
class Gpus:
    """GPUs, and what torch can do with them.

    Attributes:
        devices: names, as torch sees them.
        driver: version of NVIDIA's driver; None where there is none.
        cuda_build: CUDA that torch was built for; None for a build without.
        nccl: NCCL version of torch; None without.
    """

    devices: tuple[str, ...]
    driver: str | None
    cuda_build: str | None
    nccl: str | None


@dataclass(frozen=True)
class Slurm:
    """The scheduler.

    Attributes:
        commands: which of sbatch, sinfo, squeue are on the path.
        job: the allocation that this process is in; None outside of one.
        partitions: as sinfo lists them: name, state, nodes, cores, GPUs.
        refused: the first thing that sinfo or squeue complained about.
    """

    commands: tuple[str, ...]
    job: str | None
    partitions: tuple[str, ...] = ()
    refused: str | None = None


@dataclass(frozen=True)
class Disk:
    """Where results go: whether this process may write there, and how much."""

    writable: bool
    free_bytes: int


@dataclass(frozen=True)
class Files:
    """Files by name.

    Attributes:
        whole: which can be read and pass their checks.
        broken: for the others, what is wrong with each.
    """

    whole: tuple[str, ...]
    broken: dict[str, str]


def packages() -> Packages:
    """Versions, and what the project's own files say of them."""
    from packaging.requirements import Requirement

    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {Requirement(line).name: line for line in project["dependencies"]}
    lines = (PROJECT_ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return Packages(
        python=platform.python_version(),
        python_range=project["requires-python"],
        ranges=needed,
        installed={name: _version(name) for name in needed},
        tested=tested,
    )


def megatron() -> Megatron:
    """Import Megatron-Core in a process of its own: a broken extension may end the process that imports it."""
    found = _version("megatron-core")
    back_ends = tuple(name for name, module in BACK_ENDS.items() if find_spec(module) is not None)
    if found is None:
        return Megatron(None, "it is not installed", back_ends)
    done = _run([sys.executable, "-c", _IMPORT_MEGATRON], IMPORT_SECONDS)
    return Megatron(found, None if done.returncode == 0 else _last_line(done), back_ends)


def size() -> Size:
    """What the scheduler of this machine lets the process use; a container's memory limit counts."""
    free = psutil.virtual_memory().available
    if _CGROUP_MEMORY.exists() and (limit := _CGROUP_MEMORY.read_text().strip()) != "max":
        free = min(free, int(limit))
    return Size(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, free)


def namespaces() -> Namespaces:
    """Set up two namespaces with a shaped link each, read the rate back, and take all of it down."""
    from hiermoe.ranks.emulated.requirements import missing_requirement

    missing = missing_requirement()
    if missing is not None:
        return Namespaces(missing)
    from hiermoe.ranks.emulated.network import UPLINK, EmulatedNetwork
    from hiermoe.topology.cluster import Cluster

    cluster = Cluster.named("emulated_4x2").reduced(4)
    wanted = round(cluster.shaped_rates[0] * 1e6 / 8)
    try:
        with EmulatedNetwork(cluster) as network:
            return Namespaces(None, wanted, network.leaves[0].run(lambda: _bucket_rate(UPLINK)))
    except ValueError as error:  # the network says what the kernel refused
        return Namespaces(str(error))


def gpus() -> Gpus:
    """GPUs as torch and as the driver see them."""
    import torch

    driver = None
    if shutil.which("nvidia-smi"):
        done = _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        driver = done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    nccl = None
    if torch.version.cuda is not None and torch.distributed.is_nccl_available():
        from torch.cuda import nccl as torch_nccl

        nccl = ".".join(map(str, torch_nccl.version()))
    return Gpus(tuple(devices), driver, torch.version.cuda, nccl)


def slurm() -> Slurm:
    """What the scheduler answers, or the allocation that this process is in."""
    commands = tuple(name for name in ("sbatch", "sinfo", "squeue") if shutil.which(name))
    job = os.environ.get("SLURM_JOB_ID")
    if not {"sinfo", "squeue"} <= set(commands):
        return Slurm(commands, job)
    listed = _run(["sinfo", "--noheader", "--format=%P %a %D nodes %c cores %G"])
    if listed.returncode != 0:
        return Slurm(commands, job, refused=_first_line(listed))
    queued = _run(["squeue", "--noheader", "--me"])
    refused = None if queued.returncode == 0 else _first_line(queued)
    return Slurm(commands, job, tuple(line.strip() for line in listed.stdout.splitlines()), refused)


def torchrun() -> str | None:
    """The launcher of this environment, else of the path; None where there is neither."""
    beside = Path(sys.executable).with_name("torchrun")
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("torchrun")


def disk() -> Disk:
    """Space where results go."""
    folder = next(path for path in (RUNS, *RUNS.parents) if path.exists())
    return Disk(os.access(folder, os.W_OK), shutil.disk_usage(folder).free)


def traces() -> Files:
    """Compare the arrays of the shipped traces with the checksums in them.

    `RoutingTrace.load` begins with that too; the rest of it needs torch, whose import takes longer than all of this.
    """
    whole, broken = [], {}
    for name in SHIPPED_TRACES:
        try:
            with zipfile.ZipFile(PROJECT_ROOT / "results" / "traces" / f"{name}.trace") as archive:
                checksums: dict[str, str] = json.loads(archive.read("metadata.json"))["sha256"]
                found = {array: hashlib.sha256(archive.read(f"{array}.npy")).hexdigest() for array in checksums}
        except FileNotFoundError:
            broken[name] = "there is no such file"
        except Exception as error:  # bz2 and zlib raise their own kinds on altered bytes
            broken[name] = f"truncated or altered: {error}"
        else:
            if checksums and found == checksums:
                whole.append(name)
            else:
                broken[name] = "altered: a checksum does not match"
    return Files(tuple(whole), broken)


def calibrations() -> Files:
    """Read the clusters that `hiermoe calibrate` has written."""
    from hiermoe.topology.cluster import Cluster

    whole, broken = [], {}
    for path in sorted(CLUSTERS.glob("*.yaml")):
        try:
            Cluster.named(str(path))
            whole.append(path.stem)
        except Exception as error:  # whatever a hand-edited YAML file may hold
            broken[path.stem] = str(error).splitlines()[0]
    return Files(tuple(whole), broken)


def _bucket_rate(name: str) -> int:
    """Bytes per second of the token bucket at an interface of this namespace."""
    from pyroute2 import IPRoute

    ip: Any
    with IPRoute() as ip:
        index = ip.link_lookup(ifname=name)[0]
        queues: list[Any] = list(ip.get_qdiscs(index))
        for queue in queues:
            if queue.get_attr("TCA_KIND") == "tbf":
                return int(queue.get_attr("TCA_OPTIONS").get_attr("TCA_TBF_PARMS")["rate"])
    raise RuntimeError(f"the link {name} has no token bucket")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _run(command: list[str], timeout: float = COMMAND_SECONDS) -> subprocess.CompletedProcess[str]:
    """Run to its end or to the time limit.

    Raises:
        TimeoutError: it has not ended; it has been killed.
    """
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{Path(command[0]).name} gave no answer within {timeout:g} s") from None


def _first_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return re.sub(r"^\w+: (error|fatal): ", "", lines[0]) if lines else f"exit code {done.returncode}"


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"its import ended with exit code {done.returncode}"
