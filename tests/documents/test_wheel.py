"""The suite as people install it: a wheel in an environment of its own, used from an empty folder."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.documents.documents import copy_project

pytestmark = pytest.mark.slow
SMALL = ("iterations=4", "tokens_per_rank=64")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel in it, which borrows all that the wheel needs from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_project(folder / "project")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", ".", "./project"]
    subprocess.run(build, cwd=folder, check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=300)
    found = folder / "venv" / "bin" / "python"
    install = [found, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, timeout=300)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # A folder that a .pth file names is looked into, but its own .pth files (the editable install) are not heeded.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return found


def use(python: Path, folder: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HIERMOE_HOME")}
    done = subprocess.run(
        [str(python.parent / "hiermoe"), *arguments],
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "Traceback" not in done.stderr
    return done


def test_commands_work_from_an_empty_folder_and_leave_their_results_there(python: Path, tmp_path: Path) -> None:
    done = use(python, tmp_path, "run", "system=hiermoe", "routing=recorded", *SMALL)
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "results" / "runs").glob("*/records.parquet")
    assert record.parent.name.startswith("hiermoe-qwen3_30b_a3b_paper-")
    done = use(
        python, tmp_path, "advise", "routing=uniform", "model=qwen3_30b_a3b", "cluster=a6000_4x8", "iterations=8"
    )
    assert done.returncode == 0, done.stderr
    for command in (("trace", "show", "qwen3_30b_a3b_e128_late"), ("report",), ("published",)):
        done = use(python, tmp_path, *command)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "reports" / "report.html").stat().st_size > 10_000
    done = use(python, tmp_path, "doctor")
    assert "traces" in done.stdout and "git checkout" not in done.stdout
    made = {path.name for path in tmp_path.iterdir()}
    assert made <= {"results", "reports", "advice", "wandb", ".cache"} | {
        path for path in made if path.endswith(".html")
    }


def test_results_go_where_one_is_told(python: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    done = use(python, tmp_path / "here", "run", "system=hd2", *SMALL, HIERMOE_HOME=str(tmp_path / "there"))
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "there" / "results" / "runs").iterdir())) == 1
    assert not list((tmp_path / "here").iterdir())


def test_what_a_training_names_is_found(python: Path, tmp_path: Path) -> None:
    """As `attach(model, "hiermoe", "a6000_4x8")` looks names up."""
    lines = (
        "from hiermoe.policies.system import SystemConfig",
        "from hiermoe.topology.cluster import Cluster",
        "import hiermoe",
        "print(SystemConfig.named('hiermoe').label, Cluster.named('a6000_4x8').hierarchy.num_ranks, hiermoe.__file__)",
    )
    done = subprocess.run([python, "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("HierMoE 32 "), done.stderr
    assert str(python.parents[1]) in done.stdout
