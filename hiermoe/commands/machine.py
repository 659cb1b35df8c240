"""What is on this machine, and what that allows: one check a section, for `hiermoe doctor`.

A check looks, and has a pure function judge what it saw. It raises what it runs into; the caller shows that as a check
that failed. Commands of others get a time limit, since a broken driver or an unreachable scheduler may hang.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hiermoe.model import ModelConfig
from hiermoe.ranks.memory import OWN_BYTES, SHARED_BYTES, bytes_of_rank, cores, ranks_that_fit
from hiermoe.records.free_memory import free_bytes
from hiermoe.records.project import CLUSTERS, CONF, RUNS, SHIPPED, TRACES
from hiermoe.records.provenance import nccl_version
from hiermoe.routing.trace_archive import read_archive

COMMAND_SECONDS = 20.0
IMPORT_SECONDS = 55.0  # 3 on an idle machine

# Largest resident size of `hiermoe run measure=predict` on recorded routing, 32 GPUs: 491 MB.
SIMULATION_BYTES = 500 * 10**6
# All runs of a whole reproduction take under 20 MB, its report 30 MB; the rest is room for recorded traces.
RESULTS_BYTES = 500 * 10**6

# What `make reproduce` walks through with routing=recorded.
SHIPPED_TRACES = (
    "qwen3_30b_a3b_e128_early",
    "qwen3_30b_a3b_e128_late",
    "deepseek_v3_e256_early",
    "deepseek_v3_e256_late",
)

# Megatron-Core's optional back ends, and the modules they are found by.
BACK_ENDS = {
    "transformer-engine": "transformer_engine",
    "grouped_gemm": "grouped_gemm",
    "apex": "apex",
    "flash-attn": "flash_attn",
}

_IMPORT_MEGATRON = (
    "import warnings; warnings.simplefilter('ignore'); "
    "from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher"
)

State = Literal["ok", "limited", "missing"]
Answer = tuple[State, str, str]
"""State (``limited`` is there with less than it could be), what was found, and what would make it ok, if it is not."""


def packages() -> Answer:
    """Versions, and what the project's own files say of them."""
    said = metadata("hiermoe")
    every = [Requirement(line) for line in said.get_all("Requires-Dist") or ()]
    needed = [one for one in every if one.marker is None or one.marker.evaluate({"extra": ""})]
    lines = (SHIPPED / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    installed = {one.name: _version(one.name) for one in needed}
    return judge_packages(platform.python_version(), said["Requires-Python"], needed, installed, tested)


def judge_packages(
    python: str,
    python_range: str,
    needed: Sequence[Requirement],
    installed: Mapping[str, str | None],
    tested: Mapping[str, str],
) -> Answer:
    """Required ranges first, tested versions second."""
    wrong = []
    if not SpecifierSet(python_range).contains(python, prereleases=True):
        wrong.append(f"Python {python} (needs {python_range})")
    for requirement in needed:
        have = installed[requirement.name]
        if have is None:
            wrong.append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(have, prereleases=True):
            wrong.append(f"{requirement.name} {have} (needs {requirement.specifier})")
    if wrong:
        return "missing", "; ".join(wrong), "make setup (with PYTHON=<a newer one> where Python is too old)"
    # A local part such as +cpu or +cu126 names a build of the same version.
    other = [
        f"{name} {have} (tested: {tested[name]})"
        for name, have in installed.items()
        if have is not None and name in tested and have.split("+")[0] != tested[name]
    ]
    found = f"Python {python}, {len(needed)} packages in their ranges"
    if other:
        return "limited", f"{found}; not the tested version: {', '.join(other)}", "make setup installs constraints.txt"
    return "ok", f"{found}, in the tested versions", ""


def traces() -> Answer:
    """Compare the arrays of the shipped traces with the checksums in them: all, or recorded routing has no numbers."""
    paths = [TRACES / f"{name}.trace" for name in SHIPPED_TRACES]
    whole, broken = _tried(read_archive, paths)
    if broken:
        return "missing", broken, "git checkout results/traces"
    return "ok", f"whole: {whole}", ""


def size() -> Answer:
    """What the scheduler of this machine lets the process use, and what ranks of a run as it is by default take."""
    content = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    (name,) = (entry["model"] for entry in content["defaults"] if "model" in entry)
    model, tokens = ModelConfig.named(name), content["tokens_per_rank"]
    return judge_size(cores(), free_bytes(), bytes_of_rank(tokens, model.topk, model.token_bytes))


def judge_size(cores: int, free: int, each: int) -> Answer:
    """How many ranks fit in memory; more ranks than cores only wait for each other.

    Args:
        cores: that this process may use.
        free: memory, bytes.
        each: what a rank at full width has for itself.
    """
    full, narrow = ranks_that_fit(free, each), ranks_that_fit(free, OWN_BYTES)
    found = (
        f"{cores} cores, {free / 1e9:.1f} GB free: {full} ranks fit at full width ({each / 1e6:.0f} MB each, and "
        f"{SHARED_BYTES / 1e6:.0f} MB that they share), {narrow} narrow ones; "
        f"{min(narrow, cores)} with a core of their own"
    )
    if free < SIMULATION_BYTES:
        return "missing", found, f"{SIMULATION_BYTES / 1e9:g} GB of free memory for one simulation"
    if full < 8:
        needed = SHARED_BYTES + 8 * each
        return "limited", found, f"{needed / 1e9:.1f} GB of free memory for world_size=8 at full width"
    return "ok", found, ""


def disk() -> Answer:
    """Whether this process may write where results go, and how much."""
    folder = next(path for path in (RUNS, *RUNS.parents) if path.exists())
    return judge_disk(os.access(folder, os.W_OK), shutil.disk_usage(folder).free)


def judge_disk(writable: bool, free_bytes: int) -> Answer:
    """Room for a whole reproduction."""
    found = f"{free_bytes / 1e9:.1f} GB free"
    if not writable:
        return "missing", f"{found}, but it cannot be written", "permission to write to results/"
    if free_bytes < RESULTS_BYTES:
        return "missing", found, f"{RESULTS_BYTES / 1e9:g} GB free where results/ is"
    return "ok", found, ""


def megatron() -> Answer:
    """Import Megatron-Core in a process of its own: a broken extension may end the process that imports it."""
    found, import_error = _version("megatron-core"), "it is not installed"
    if found is not None:
        import_error = _complaint(_run([sys.executable, "-c", _IMPORT_MEGATRON], IMPORT_SECONDS), line=-1)
    return judge_megatron(found, import_error, [name for name, module in BACK_ENDS.items() if find_spec(module)])


def judge_megatron(found: str | None, import_error: str | None, back_ends: Sequence[str]) -> Answer:
    """On CPU none of the back ends is needed."""
    if import_error is not None:
        return "missing", f"Megatron-Core{f' {found}' if found else ''}: {import_error}", "make setup"
    absent = ", ".join(name for name in BACK_ENDS if name not in back_ends)
    parts = [f"{found} imports", f"back ends there: {', '.join(back_ends) or 'none'}"]
    if absent:
        parts.append(f"not there, and not needed on CPU: {absent}")
    return "ok", "; ".join(parts), ""


def emulated_links() -> Answer:
    """Set up two namespaces with a shaped link each, read the rate back, and take all of it down."""
    from hiermoe.ranks.emulated.requirements import missing_requirement

    lacking = missing_requirement()
    if lacking is not None:
        return "missing", "no emulated links", lacking
    from hiermoe.ranks.emulated.network import UPLINK, EmulatedNetwork
    from hiermoe.topology.cluster import Cluster

    cluster = Cluster.named("emulated_4x2").reduced(4)
    wanted = round(cluster.shaped_rates[0] * 1e6 / 8)
    try:
        with EmulatedNetwork(cluster) as network:
            return judge_link(wanted, network.leaves[0].run(lambda: _bucket_rate(UPLINK)))
    except ValueError as error:  # the network says what the kernel refused
        return "missing", "no emulated links", str(error)


def judge_link(wanted_bytes_per_s: int, found_bytes_per_s: int) -> Answer:
    """Ok only where the kernel gave a shaped link the rate that was asked for."""
    if found_bytes_per_s != wanted_bytes_per_s:
        found = f"a link asked for {wanted_bytes_per_s} B/s has {found_bytes_per_s} B/s"
        return "limited", found, "a kernel whose sch_tbf keeps the rate"
    return "ok", f"namespaces, veth and tbf work: a link of {wanted_bytes_per_s / 1e6:g} MB/s was made", ""


def _bucket_rate(name: str) -> int:
    """Bytes per second of the token bucket at an interface of this namespace."""
    from pyroute2 import IPRoute

    ip: Any
    with IPRoute() as ip:
        for queue in ip.get_qdiscs(ip.link_lookup(ifname=name)[0]):
            if queue.get_attr("TCA_KIND") == "tbf":
                return int(queue.get_attr("TCA_OPTIONS").get_attr("TCA_TBF_PARMS")["rate"])
    raise RuntimeError(f"the link {name} has no token bucket")


def gpus() -> Answer:
    """GPUs as torch and as the driver see them."""
    import torch

    driver = None
    if shutil.which("nvidia-smi"):
        done = _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        driver = done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    nccl = nccl_version()
    return judge_gpus(devices, driver, torch.version.cuda, None if nccl is None else ".".join(map(str, nccl)))


def judge_gpus(devices: Sequence[str], driver: str | None, cuda_build: str | None, nccl: str | None) -> Answer:
    """All of GPU, driver, CUDA build and NCCL."""
    parts = [
        f"{len(devices)} GPUs" + (f" ({', '.join(sorted(set(devices)))})" if devices else ""),
        f"driver {driver}" if driver else "no NVIDIA driver",
        f"torch for CUDA {cuda_build}" if cuda_build else "torch without CUDA",
        f"NCCL {nccl}" if nccl else "no NCCL",
    ]
    found = ", ".join(parts)
    if devices and cuda_build and nccl:
        return "ok", f"{found}; `make test-gpu` has eight ranks exchange on them", ""
    if driver is None and not devices:
        more = "" if cuda_build else ", and a CUDA build of torch"
        return "missing", found, f"a machine with NVIDIA GPUs and their driver{more}"
    if cuda_build is None or nccl is None:
        return "limited", found, "a CUDA build of torch with NCCL in this environment"
    return "limited", found, "a GPU that torch can see (CUDA_VISIBLE_DEVICES, driver not older than torch's CUDA)"


def slurm() -> Answer:
    """What the scheduler answers, or the allocation that this process is in."""
    commands = [name for name in ("sbatch", "sinfo", "squeue") if shutil.which(name)]
    partitions, refused = [], None
    if {"sinfo", "squeue"} <= set(commands):
        listed = _run(["sinfo", "--noheader", "--format=%P %a %D nodes %c cores %G"])
        partitions = [line.strip() for line in listed.stdout.splitlines()]
        refused = _complaint(listed) or _complaint(_run(["squeue", "--noheader", "--me"]))
    return judge_slurm(commands, os.environ.get("SLURM_JOB_ID"), partitions, refused)


def judge_slurm(commands: Sequence[str], job: str | None, partitions: Sequence[str], refused: str | None) -> Answer:
    """Inside an allocation srun is enough; outside, the controller must answer."""
    there = f"found {', '.join(commands)}" if commands else "no Slurm commands"
    if job is not None and refused is None:
        return "ok", f"inside allocation {job}; {there}", ""
    if len(commands) < 3:
        return "missing", there, "a login node of a Slurm cluster (sbatch, sinfo and squeue on the path)"
    if refused is not None:
        return "limited", f"{there}, but no controller answers: {refused}", "a slurm.conf that names a controller"
    if not partitions:
        return "limited", f"{there}; sinfo lists no partition", "access to a partition"
    return "ok", f"{there}; partitions: {'; '.join(partitions)}", ""


def torchrun() -> Answer:
    """The launcher of this environment, else of the path. It comes with torch."""
    if os.access(Path(sys.executable).with_name("torchrun"), os.X_OK) or shutil.which("torchrun"):
        return "ok", "found", ""
    return "missing", "not in this environment, not on the path", "make setup (it comes with torch)"


def calibrations() -> Answer:
    """Read the clusters that `hiermoe calibrate` has written. None is needed for the paper's own, which are shipped."""
    from hiermoe.topology.cluster import Cluster

    whole, broken = _tried(lambda path: Cluster.named(str(path)), sorted(CLUSTERS.glob("*.yaml")))
    if broken:
        return "limited", broken, "hiermoe calibrate writes the file anew"
    if not whole:
        return "missing", "none in results/clusters", "hiermoe calibrate cluster=<name> ranks=<where they are>"
    return "ok", whole, ""


def _tried(read: Callable[[Path], object], paths: Iterable[Path]) -> tuple[str, str]:
    """Names of the files that can be read, and what is wrong with each of the others; empty where there are none."""
    whole, broken = [], []
    for path in paths:
        try:
            read(path)
            whole.append(path.stem)
        except Exception as error:  # whatever a hand-edited file may hold
            broken.append(f"{path.stem}: {str(error).splitlines()[0]}")
    return ", ".join(whole), "; ".join(broken)


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


def _complaint(done: subprocess.CompletedProcess[str], line: int = 0) -> str | None:
    """A line of what a command said that failed; None where it did not."""
    if done.returncode == 0:
        return None
    lines = (done.stderr or done.stdout).strip().splitlines()
    return re.sub(r"^\w+: (error|fatal): ", "", lines[line]) if lines else f"exit code {done.returncode}"
