"""`hiermoe doctor`: states follow from facts, a check that fails says so, and the command ends."""

import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hiermoe.commands import doctor_command as doctor
from hiermoe.commands import machine
from hiermoe.commands.doctor_command import Check, Question, examine, what_reproduce_lacks
from hiermoe.commands.machine import Answer, State
from hiermoe.ranks import memory
from hiermoe.ranks.emulated import requirements
from hiermoe.records.project import CONF
from tests.routing.worlds import a_trace

NEEDED = [Requirement("torch>=2.6"), Requirement("pandera[pandas]>=0.24")]
TESTED = {"torch": "2.13.0", "pandera": "0.35.0", "ruff": "0.17.6"}
INSTALLED = {"torch": "2.13.0+cpu", "pandera": "0.35.0"}
H100 = ("H100", "H100")
COMMANDS = ("sbatch", "sinfo", "squeue")
PARTITIONS = ("gpu* up 4 nodes 64 cores gpu:8",)
RANK, SHARED = 10**9, memory.SHARED_BYTES
MEMORY = machine.SIMULATION_BYTES
ROOM = machine.RESULTS_BYTES


def packages(python: str = "3.12.1", installed: Mapping[str, str | None] = INSTALLED) -> Answer:
    return machine.judge_packages(python, ">=3.11", NEEDED, installed, TESTED)


@pytest.mark.parametrize(
    ("answer", "state", "says"),
    [
        (packages(), "ok", "2 packages in their ranges"),
        (packages(python="3.10.4"), "missing", "Python 3.10.4 (needs >=3.11)"),
        (
            packages(installed={"torch": "2.5.1", "pandera": None}),
            "missing",
            "torch 2.5.1 (needs >=2.6); pandera is not installed",
        ),
        (packages(installed={"torch": "2.14.0", "pandera": "0.35.0"}), "limited", "torch 2.14.0 (tested: 2.13.0)"),
        (
            machine.judge_megatron("0.16.1", None, ("apex",)),
            "ok",
            "not needed on CPU: transformer-engine, grouped_gemm, flash-attn",
        ),
        (machine.judge_megatron(None, "it is not installed", ()), "missing", "not installed"),
        (machine.judge_megatron("0.16.1", "ImportError: libcudart", ("apex",)), "missing", "libcudart"),
        (machine.judge_size(2, SHARED + 8 * RANK, RANK), "ok", "8 ranks fit at full width (1000 MB each"),
        (machine.judge_size(16, SHARED + 8 * RANK - 1, RANK), "limited", "7 ranks fit"),
        (machine.judge_size(2, MEMORY - 1, RANK), "missing", "0.5 GB of free memory"),
        (machine.judge_link(1000, 1000), "ok", "a link of 0.001 MB/s was made"),
        (machine.judge_link(1000, 0), "limited", "asked for 1000 B/s has 0 B/s"),
        (
            machine.judge_gpus(H100, "570.1", "12.6", "2.27.3"),
            "ok",
            "2 GPUs (H100), driver 570.1, torch for CUDA 12.6, NCCL 2.27.3; `make test-gpu`",
        ),
        (machine.judge_gpus((), None, None, None), "missing", "and a CUDA build of torch"),
        (machine.judge_gpus((), "570.1", None, None), "limited", "a CUDA build of torch with NCCL"),
        (machine.judge_gpus((), "570.1", "12.6", "2.27.3"), "limited", "a GPU that torch can see"),
        (machine.judge_gpus(H100, "570.1", "12.6", None), "limited", "no NCCL"),
        (machine.judge_slurm(COMMANDS, None, PARTITIONS, None), "ok", "partitions: gpu* up 4 nodes"),
        (machine.judge_slurm((), None, (), None), "missing", "a login node"),
        (machine.judge_slurm((), "17", (), None), "ok", "inside allocation 17"),
        (
            machine.judge_slurm(COMMANDS, None, PARTITIONS, "Unknown host"),
            "limited",
            "no controller answers: Unknown host",
        ),
        (machine.judge_slurm(COMMANDS, None, (), None), "limited", "lists no partition"),
        (machine.judge_disk(True, ROOM - 1), "missing", "0.5 GB free where results/ is"),
        (machine.judge_disk(True, ROOM), "ok", "0.5 GB free"),
        (machine.judge_disk(False, 10**12), "missing", "permission to write"),
    ],
)
def test_state_follows_from_the_facts(answer: Answer, state: State, says: str) -> None:
    found_state, found, takes = answer
    assert found_state == state
    assert says in f"{found} | {takes}"
    assert bool(takes) == (state != "ok"), "what is not ok says what it takes"


def test_what_is_not_there_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(requirements, "effective_capabilities", lambda: 0)
    state, _, takes = machine.emulated_links()
    assert state == "missing" and "run it as root" in takes
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    state, _, takes = machine.torchrun()
    assert state == "missing" and "make setup" in takes


def test_calibrated_clusters_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CLUSTERS", tmp_path)
    state, _, takes = machine.calibrations()
    assert state == "missing" and "hiermoe calibrate" in takes
    shipped = CONF / "cluster" / "emulated_4x2.yaml"
    (tmp_path / "mine.yaml").write_bytes(shipped.read_bytes())
    assert machine.calibrations() == ("ok", "mine", "")
    (tmp_path / "old.yaml").write_text("beta: 1")
    state, found, takes = machine.calibrations()
    assert state == "limited" and found.startswith("old: ") and takes


def test_a_check_that_raises_is_shown_as_failed_and_one_that_hangs_as_slow() -> None:
    release = threading.Event()

    def raises() -> Answer:
        raise RuntimeError("the driver\nis upset")

    def leaves() -> Answer:
        raise SystemExit(3)

    def hangs() -> Answer:
        release.wait()
        return fine()

    def fine() -> Answer:
        return "ok", "", ""

    checks = examine(
        (
            Question("a", "", raises),
            Question("b", "", leaves),
            Question("c", "", hangs, required=True),
            Question("d", "", fine),
        ),
        deadline_seconds=1.0,
    )
    assert not release.is_set()  # nobody waited for the one that hangs
    release.set()
    assert [check.state for check in checks] == ["failed", "failed", "slow", "ok"]
    assert checks[0].found == "the check itself failed: RuntimeError: the driver"
    assert "no answer within 1 s" in checks[2].found
    assert what_reproduce_lacks(checks) is None  # a slow machine lacks nothing
    failed = Check("a", "failed", "", "", required=True)
    assert what_reproduce_lacks([*checks, failed]) == "make reproduce cannot run here: see a"


@pytest.mark.parametrize(
    ("state", "lacking"), [("ok", False), ("limited", False), ("missing", True), ("failed", True), ("slow", False)]
)
def test_only_required_checks_decide_whether_reproduce_can_run(state: doctor.State, lacking: bool) -> None:
    checks = [Check("needed", state, "", "", required=True), Check("not needed", "missing", "", "")]
    assert (what_reproduce_lacks(checks) is not None) == lacking


def test_a_command_that_hangs_is_ended() -> None:
    with pytest.raises(TimeoutError, match=r"sleep gave no answer within 0.1 s"):
        machine._run(["sleep", "60"], timeout=0.1)


def test_a_broken_trace_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path
    first, second, *_ = machine.SHIPPED_TRACES
    monkeypatch.setattr(machine, "SHIPPED_TRACES", (first, second))
    monkeypatch.setattr(machine, "TRACES", tmp_path)
    a_trace().save(folder / f"{first}.trace")
    assert machine.traces() == (
        "missing",
        f"{second}: no trace at {folder / second}.trace",
        "git checkout results/traces",
    )
    a_trace().save(folder / f"{second}.trace")
    assert machine.traces() == ("ok", f"whole: {first}, {second}", "")
    content = (folder / f"{first}.trace").read_bytes()
    (folder / f"{second}.trace").write_bytes(content[:-100])
    with zipfile.ZipFile(folder / f"{first}.trace") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / f"{first}.trace", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[:-1] + b"x" if name == "expert_ids.npy" else data)
    _, broken, _ = machine.traces()
    assert f"{first}.trace is altered: checksum of expert_ids does not match; {second}: " in broken
    assert f"{second}.trace is truncated or not a trace" in broken


@pytest.mark.slow
def test_command_reports_on_this_machine_in_json_and_ends() -> None:
    command = [sys.executable, "-m", "hiermoe", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert [check["name"] for check in report["checks"]] == [question.name for question in doctor.QUESTIONS]
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert states["disk for results/"] == "ok"
    required = [check["state"] for check in report["checks"] if check["required"]]
    assert report["reproduce"] == all(state in ("ok", "limited", "slow") for state in required)
    assert done.returncode == (0 if report["reproduce"] else 1)
    assert bool(done.stderr) == (not report["reproduce"])
