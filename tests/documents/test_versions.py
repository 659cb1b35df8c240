"""The suite under every Python that it declares and this machine has: set up anew, run and asked for advice."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hiermoe.records.project import CODE
from tests.documents.documents import copy_project
from tests.megatron import settings_matrix

pytestmark = [pytest.mark.versions, pytest.mark.timeout(3600)]
VERSIONS = ("3.11", "3.12", "3.13")
NEWEST_MEGATRON = "0.19.2"  # beside that of constraints.txt, with which all other tests run
TOOLS = ("pytest", "hypothesis")  # of the extra "dev", what these tests need
FEW = ("routing=recorded", "iterations=4", "wandb.mode=disabled")
QUESTION = ("trace=qwen3_30b_a3b_e128_late", "cluster=a6000_1x8", "systems=[hd2,hiermoe]")


def interpreter(version: str) -> Path | None:
    """Of this machine: on its PATH, else of pyenv."""
    if found := shutil.which(f"python{version}"):
        works = subprocess.run([found, "-c", "import venv"], capture_output=True, check=False).returncode == 0
        if works:
            return Path(found)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    return next(iter(sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)), None)


@pytest.fixture(scope="module", params=VERSIONS)
def hiermoe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of an environment of that Python; gigabytes, gone after its tests."""
    python = interpreter(request.param)
    if python is None:
        pytest.skip(f"no Python {request.param} on this machine")
    if request.param == f"{sys.version_info.major}.{sys.version_info.minor}":
        return Path(sys.executable).parent / "hiermoe"  # of this environment, set up as the others are
    folder = tmp_path_factory.mktemp(f"python{request.param}")
    copy_project(folder / "project")
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True, timeout=300)
    pip = [folder / "venv" / "bin" / "python", "-m", "pip", "install", "-q", "--no-compile"]
    subprocess.run([*pip, "-c", CODE / "constraints.txt", folder / "project"], check=True, timeout=3000)
    request.addfinalizer(lambda: shutil.rmtree(folder))
    return folder / "venv" / "bin" / "hiermoe"


@pytest.mark.parametrize(
    "command",
    [
        ("run", "system=hiermoe", *FEW),
        ("advise", *QUESTION),
        ("run", "measure=replay", "ranks=local", "world_size=2", "narrowed=64", "system=hd1", *FEW[1:]),
    ],
    ids=["run", "advise", "ranks"],
)
def test_commands_work(command: tuple[str, ...], hiermoe: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [hiermoe, *command],
        cwd=tmp_path,
        env=environment | {"HIERMOE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.glob("advice/*/advice.html" if command[0] == "advise" else "results/runs/*/records.parquet"))


@pytest.mark.parametrize("hiermoe", ["3.12"], indirect=True)
def test_megatron_tests_pass_on_the_newest_megatron(
    hiermoe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = hiermoe.parent / "python"
    with (CODE / "pyproject.toml").open("rb") as file:
        tools = [x for x in tomllib.load(file)["project"]["optional-dependencies"]["dev"] if x.startswith(TOOLS)]
    # Megatron imports triton, which torch brings where there are GPUs, and writes scalars with tensorboard.
    wanted = [f"megatron-core=={NEWEST_MEGATRON}", "triton", "tensorboard", *tools]
    install = [python, "-m", "pip", "install", "-q", "--no-compile", *wanted]
    subprocess.run(install, check=True, timeout=1200)
    called = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "tests/megatron"]
    called += ["-m", settings_matrix.TESTS]
    called.append(f"--junitxml={tmp_path / 'report.xml'}")
    done = subprocess.run(called, cwd=CODE, capture_output=True, text=True, timeout=1800, check=False)
    counts = done.stdout.strip().splitlines()[-1]
    with capsys.disabled():
        print(f"\nPython 3.12, megatron-core {NEWEST_MEGATRON}, tests/megatron: {counts}")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    assert settings_matrix.cells(tmp_path / "report.xml") == settings_matrix.column_shown(NEWEST_MEGATRON)


def test_what_is_declared_is_what_is_tried() -> None:
    text = (CODE / "pyproject.toml").read_text()
    (lowest,) = re.findall(r'requires-python = ">=([\d.]+)"', text)
    assert lowest == VERSIONS[0]
    ((first, last),) = re.findall(r'"megatron-core>=([\d.]+),<([\d.]+)"', text)
    assert f"megatron-core=={first}\n" in (CODE / "constraints.txt").read_text()
    major, minor, _ = NEWEST_MEGATRON.split(".")
    assert last == f"{major}.{int(minor) + 1}"
