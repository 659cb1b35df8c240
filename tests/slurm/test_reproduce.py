"""`make reproduce ON=slurm` against a real Slurm: it completes, and goes on where a job was ended."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from hiermoe.records.project import CODE
from tests.documents.documents import copy_project
from tests.slurm.cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]

QUICK = ("ON=slurm", "NODES=4", "GPUS_PER_NODE=2", "DEVICE=cpu", "QUICK=1")

# Two groups of runs: one is finished while the other is under way, for longer than an ended job may still go on.
SWEEP = """\
# @package _global_
hydra:
  sweeper:
    params:
      measure: replay
      ranks: emulated
      cluster: emulated_4x2_calibrated
      tokens_per_rank: 32
      narrowed: 16
      iterations: 160
      model: qwen3_30b_a3b
      routing: recorded,uniform
      system: megatron,hd2_moe,hiermoe
"""
RUNS = 6


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Four nodes."""
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


class Project:
    """A copy of the project, so that its results are this test's own, and its commands on the cluster."""

    def __init__(self, folder: Path, cluster: SlurmCluster) -> None:
        """Copy what git knows."""
        self.folder = folder
        self.cluster = cluster
        copy_project(folder)
        self._cut_down()

    def _cut_down(self) -> None:
        """Make QUICK=1 measure even less."""
        for path in (self.folder / "sweeps" / "measured").rglob("*.yaml"):
            path.unlink()  # the others would only be composed, for the report
        (self.folder / "sweeps" / "measured" / "quick" / "fig11.yaml").write_text(SWEEP)

    def start(self, *variables: str) -> "subprocess.Popen[str]":
        """`make reproduce` with the virtual environment of the tests."""
        venv = CODE / ".venv"
        # Loopback: all nodes are here. PYTHONPATH: the copy, and not what the environment has installed.
        environment = {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(self.folder), "WANDB_MODE": "disabled"}
        command = ["make", f"VENV={venv}", "-o", f"{venv}/.installed", "reproduce", *variables]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=os.environ | self.cluster.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A test that runs in the background ignores Ctrl-C, and so would all that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            start_new_session=True,  # so that a signal reaches make and what it has started, as one of a terminal does
        )

    @property
    def records(self) -> dict[str, bytes]:
        """Every file of every finished run."""
        done = sorted((self.folder / "results" / "runs").glob("*/records.parquet"))
        return {str(file): file.read_bytes() for path in done for file in sorted(path.parent.iterdir())}

    def measured(self) -> pd.DataFrame:
        """Records of all measured runs."""
        frames = [pd.read_parquet(path) for path in (self.folder / "results" / "runs").glob("*/records.parquet")]
        records = pd.concat(frame.dropna(axis=1, how="all") for frame in frames)
        return records[records["source"] != "simulated"]


@pytest.fixture
def project(tmp_path: Path, cluster: SlurmCluster) -> Iterator[Project]:
    """The copy; afterwards the cluster is empty."""
    yield Project(tmp_path / "project", cluster)
    for job in cluster.job_states():
        cluster.run("scancel", job)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", timeout_s: float = 1200) -> None:
    """Until something has happened while the command runs."""
    ends = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"ended early:\n{process.communicate()[0]}")
        if time.monotonic() > ends:
            process.send_signal(signal.SIGINT)
            pytest.fail(f"nothing within {timeout_s} s:\n{process.communicate()[0]}")
        time.sleep(0.2)


def test_a_preempted_a_cancelled_and_a_left_job_go_on_with_what_is_missing(project: Project) -> None:
    first = project.start(*QUICK)
    wait_for(lambda: any(project.folder.glob("results/runs/calibrate-*/started-1.json")), first)
    job = next(iter(project.cluster.job_states()))
    project.cluster.run("scancel", "--signal=USR2", job)  # as Slurm warns a job before it takes its nodes away
    wait_for(lambda: project.cluster.job_states()[job] != "RUNNING", first)
    # Calibration and the first group are done, the second is under way.
    wait_for(lambda: len(list(project.folder.glob("results/runs/*/started-*.json"))) == RUNS // 2, first)
    wait_for(lambda: len(list(project.folder.glob("results/runs/*/records.parquet"))) == 1 + RUNS // 2, first)
    project.cluster.run("scancel", job)
    output = first.communicate(timeout=1200)[0]
    print(output)
    assert first.returncode != 0
    assert "ended as CANCELLED; finished runs are kept" in output
    assert output.count(f"job {job}: running") == 2
    assert not list(project.folder.glob("results/runs/*/started-*.json")), "to be ended is not the runs' fault"
    finished = project.records
    assert project.measured()["run_id"].nunique() == 1 + RUNS // 2
    second = project.start(*QUICK)
    wait_for(lambda: len(list(project.folder.rglob("request.json"))) == 2, second)
    wait_for(lambda: "RUNNING" in project.cluster.job_states().values(), second)
    os.killpg(second.pid, signal.SIGINT)
    output = second.communicate(timeout=600)[0]
    print(output)
    assert second.returncode != 0
    assert "goes on without this" in output
    third = project.start(*QUICK)
    output = third.communicate(timeout=1200)[0]
    print(output)
    assert third.returncode == 0, output
    assert "is under way for the same: following it" in output
    assert output.count("kept from before") > RUNS // 2
    assert {name: content for name, content in project.records.items() if name in finished} == finished
    records = project.measured()
    assert set(records["source"]) == {"cluster"}
    assert set(records["status"]) == {"ok"}
    assert set(records["cluster"]) == {"loopback_4x2_cpu_quick"}
    assert records["run_id"].nunique() == 1 + RUNS
    assert records["num_wrong"].max() == 0


def test_a_refused_submission_is_one_line(project: Project) -> None:
    done = project.start(*QUICK, "PARTITION=nowhere")
    output = done.communicate(timeout=600)[0]
    assert done.returncode != 0
    (line,) = [line for line in output.splitlines() if not line.startswith("make")]
    assert line.startswith("error: Slurm refused the job: ")
    assert "invalid partition" in line
