"""`hiermoe doctor`: states follow from facts, a check that fails says so, and the command ends."""

import json
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace

import pytest

from hiermoe.commands import doctor_command as doctor
from hiermoe.commands import machine
from hiermoe.commands.doctor_command import Check, Question, State, examine, what_reproduce_lacks
from tests.routing.worlds import a_trace

PACKAGES = machine.Packages(
    python="3.12.1",
    python_range=">=3.11",
    ranges={"torch": "torch>=2.6", "pandera": "pandera[pandas]>=0.24"},
    installed={"torch": "2.13.0+cpu", "pandera": "0.35.0"},
    tested={"torch": "2.13.0", "pandera": "0.35.0", "ruff": "0.17.6"},
)
MEGATRON = machine.Megatron("0.16.1", None, ("apex",))
GPUS = machine.Gpus(("H100", "H100"), "570.1", "12.6", "2.27.3")
SLURM = machine.Slurm(("sbatch", "sinfo", "squeue"), None, ("gpu* up 4 nodes 64 cores gpu:8",))
RANK = doctor.RANK_BYTES


@pytest.mark.parametrize(
    ("judge", "facts", "state", "says"),
    [
        (doctor.judge_packages, PACKAGES, "ok", "2 packages in their ranges"),
        (doctor.judge_packages, replace(PACKAGES, python="3.10.4"), "missing", "Python 3.10.4 (needs >=3.11)"),
        (
            doctor.judge_packages,
            replace(PACKAGES, installed={"torch": "2.5.1", "pandera": None}),
            "missing",
            "torch 2.5.1 (needs >=2.6); pandera is not installed",
        ),
        (
            doctor.judge_packages,
            replace(PACKAGES, installed={"torch": "2.14.0", "pandera": "0.35.0"}),
            "limited",
            "torch 2.14.0 (tested: 2.13.0)",
        ),
        (doctor.judge_megatron, MEGATRON, "ok", "not needed on CPU: transformer-engine, grouped_gemm, flash-attn"),
        (doctor.judge_megatron, machine.Megatron(None, "it is not installed", ()), "missing", "not installed"),
        (doctor.judge_megatron, replace(MEGATRON, import_error="ImportError: libcudart"), "missing", "libcudart"),
        (doctor.judge_size, machine.Size(2, 8 * RANK), "ok", "8 ranks fit"),
        (doctor.judge_size, machine.Size(16, 8 * RANK - 1), "limited", "7 ranks fit"),
        (doctor.judge_size, machine.Size(2, doctor.SIMULATION_BYTES - 1), "missing", "0.5 GB of free memory"),
        (doctor.judge_namespaces, machine.Namespaces(None, 1000, 1000), "ok", "a link of 0.001 MB/s was made"),
        (doctor.judge_namespaces, machine.Namespaces(None, 1000, 0), "limited", "asked for 1000 B/s has 0 B/s"),
        (doctor.judge_namespaces, machine.Namespaces("run it as root"), "missing", "run it as root"),
        (doctor.judge_gpus, GPUS, "ok", "2 GPUs (H100), driver 570.1, torch for CUDA 12.6, NCCL 2.27.3"),
        (doctor.judge_gpus, machine.Gpus((), None, None, None), "missing", "and a CUDA build of torch"),
        (doctor.judge_gpus, machine.Gpus((), "570.1", None, None), "limited", "a CUDA build of torch with NCCL"),
        (doctor.judge_gpus, replace(GPUS, devices=()), "limited", "a GPU that torch can see"),
        (doctor.judge_gpus, replace(GPUS, nccl=None), "limited", "no NCCL"),
        (doctor.judge_slurm, SLURM, "ok", "partitions: gpu* up 4 nodes"),
        (doctor.judge_slurm, machine.Slurm((), None), "missing", "a login node"),
        (doctor.judge_slurm, machine.Slurm((), "17"), "ok", "inside allocation 17"),
        (doctor.judge_slurm, replace(SLURM, refused="Unknown host"), "limited", "no controller answers: Unknown host"),
        (doctor.judge_slurm, replace(SLURM, partitions=()), "limited", "lists no partition"),
        (doctor.judge_torchrun, None, "missing", "make setup"),
        (doctor.judge_disk, machine.Disk(True, doctor.RESULTS_BYTES - 1), "missing", "0.5 GB free where results/ is"),
        (doctor.judge_disk, machine.Disk(True, doctor.RESULTS_BYTES), "ok", "0.5 GB free"),
        (doctor.judge_disk, machine.Disk(False, 10**12), "missing", "permission to write"),
        (doctor.judge_traces, machine.Files(("a",), {}), "ok", "whole: a"),
        (doctor.judge_traces, machine.Files(("a",), {"b": "checksum"}), "missing", "b: checksum"),
        (doctor.judge_calibrations, machine.Files((), {}), "missing", "hiermoe calibrate"),
        (doctor.judge_calibrations, machine.Files(("mine",), {}), "ok", "mine"),
        (doctor.judge_calibrations, machine.Files(("mine",), {"old": "beta"}), "limited", "old: beta"),
    ],
)
def test_state_follows_from_the_facts(judge, facts, state: State, says: str) -> None:
    found_state, found, takes = judge(facts)
    assert found_state == state
    assert says in f"{found} | {takes}"
    assert bool(takes) == (state != "ok"), "what is not ok says what it takes"


def test_a_check_that_raises_or_hangs_is_shown_as_failed() -> None:
    release = threading.Event()

    def raises() -> None:
        raise RuntimeError("the driver\nis upset")

    def leaves() -> None:
        raise SystemExit(3)

    def fine(_facts: object) -> tuple[State, str, str]:
        return "ok", "", ""

    checks = examine(
        (
            Question("a", "", raises, fine),
            Question("b", "", leaves, fine),
            Question("c", "", release.wait, fine, required=True),
            Question("d", "", lambda: None, fine),
        ),
        deadline_seconds=1.0,
    )
    assert not release.is_set()  # nobody waited for the one that hangs
    release.set()
    assert [check.state for check in checks] == ["failed", "failed", "failed", "ok"]
    assert checks[0].found == "the check itself failed: RuntimeError: the driver"
    assert "no answer within 1 s" in checks[2].found
    assert what_reproduce_lacks(checks) == "make reproduce cannot run here: see c"


@pytest.mark.parametrize(("state", "lacking"), [("ok", False), ("limited", False), ("missing", True), ("failed", True)])
def test_only_required_checks_decide_whether_reproduce_can_run(state: State, lacking: bool) -> None:
    checks = [Check("needed", state, "", "", required=True), Check("not needed", "missing", "", "")]
    assert (what_reproduce_lacks(checks) is not None) == lacking


def test_a_command_that_hangs_is_ended() -> None:
    with pytest.raises(TimeoutError, match=r"sleep gave no answer within 0.1 s"):
        machine._run(["sleep", "60"], timeout=0.1)


def test_a_broken_trace_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    folder = tmp_path / "results" / "traces"
    folder.mkdir(parents=True)
    first, second = machine.SHIPPED_TRACES
    monkeypatch.setattr(machine, "PROJECT_ROOT", tmp_path)
    a_trace().save(folder / f"{first}.trace")
    assert machine.traces() == machine.Files((first,), {second: "there is no such file"})
    content = (folder / f"{first}.trace").read_bytes()
    (folder / f"{second}.trace").write_bytes(content[:-100])
    with zipfile.ZipFile(folder / f"{first}.trace") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / f"{first}.trace", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[:-1] + b"x" if name == "expert_ids.npy" else data)
    broken = machine.traces().broken
    assert broken[first] == "altered: a checksum does not match"
    assert broken[second].startswith("truncated or altered")


def test_command_reports_on_this_machine_in_json_and_ends() -> None:
    command = [sys.executable, "-m", "hiermoe", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert [check["name"] for check in report["checks"]] == [question.name for question in doctor.QUESTIONS]
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert states["disk for results/"] == "ok"
    required = [check["state"] for check in report["checks"] if check["required"]]
    assert report["reproduce"] == all(state in ("ok", "limited") for state in required)
    assert done.returncode == (0 if report["reproduce"] else 1)
    assert bool(done.stderr) == (not report["reproduce"])
