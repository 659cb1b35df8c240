"""Every command of README and docs is run as it stands, in a copy of the project, or it is said here why not."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hiermoe.ranks.emulated.requirements import missing_requirement
from tests.documents.documents import commands, copy_project, words

# By pattern of the whole command.
WHY_NOT = {
    r".*(<\w+>|OLD NEW|FILE|FOLDER|=$|\.\.\.|mine\b).*": "a form that readers fill in",
    r".*(backend=local|BACKEND=slurm|timeout_minutes=10)": "how it was before",
    r"hiermoe (calibrate|train|advise|trace (import|export-matrix|show( a\.trace)?)|run max_ep_size=8)": "part of one",
    r"hiermoe calibrate from=.*": "needs readers' files: tests/commands/test_calibrate_from.py writes such files",
    r"hiermoe calibrate topology=.*|nvidia-smi .*": "needs a GPU: tests/commands/test_calibrate_topology.py",
    r"hiermoe trace import .*": "needs readers' files: tests/routing/importers imports such files",
    r"hiermoe (trace fetch \w|run .*(=public|over=real)).*": "needs a set by git: tests/commands/test_fetch.py",
    r"hiermoe run .*=\$PWD/unlimited_early\.trace": "reads what the command above it records in half an hour",
    r"hiermoe run -m \+sweeps=arena \+sweeps/over=recorded": "takes long: the same without the last word is run",
    r"hiermoe run -m \+sweeps/measured/full=\w+": "takes long: other runs on the pages are on fewer ranks",
    r"hiermoe run -m \+sweeps=fig11": "takes long: tests/commands/test_cli.py has shorter sweeps",
    r"hiermoe calibrate cluster=emulated_4x8": "takes long: the same is run on the smaller emulated_4x2",
    r"hiermoe run -m \+sweeps=structure .*": "takes long: tests/runs/test_places_of_sweeps.py composes them",
    r"hiermoe train .*": "takes long: tests/runs/test_train_parity.py trains it with fewer experts",
    r"hiermoe reproduce --sweeps arena .*": "takes long: the first of these sweeps is run",
    r"hiermoe record .*": "takes half an hour or more: tests/narrow/test_record.py records a small one",
    r"make (reproduce|report|traces|help)( FULL=1| QUICK=1)?": "takes long: parts of it are the other commands",
    r"(make reproduce ON=slurm|srun|torchrun) .*": "needs a cluster: tests/slurm runs it on one of four nodes",
    r"make (test|test-(all|slurm|browser|versions)|lint|format|bench)": "runs this test, or what CI runs beside it",
    r"make test-gpu": "needs a GPU",
    r"python docs/draw_architecture\.py": "tests/test_architecture.py does it",
}
# What writes comes before what reads.
ORDER = ("hiermoe calibrate", "hiermoe run", "hiermoe records")
RUN = sorted(
    (command for command in commands() if not any(re.fullmatch(pattern, command) for pattern in WHY_NOT)),
    key=lambda command: next((place for place, start in enumerate(ORDER) if command.startswith(start)), len(ORDER)),
)


@pytest.fixture(scope="module")
def in_copy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], "subprocess.CompletedProcess[str]"]:
    folder: Path = tmp_path_factory.mktemp("project")
    copy_project(folder)
    environment = os.environ | {"PYTHONPATH": str(folder), "WANDB_MODE": "offline"}

    def run(command: str) -> "subprocess.CompletedProcess[str]":
        called = [sys.executable, "-m", "hiermoe", *words(command)]
        return subprocess.run(called, cwd=folder, env=environment, capture_output=True, text=True, timeout=3000)

    return run


def test_every_reason_is_of_a_command_that_is_there() -> None:
    for pattern in WHY_NOT:
        assert any(re.fullmatch(pattern, command) for command in commands()), pattern
    assert all(command.startswith("hiermoe ") for command in RUN), RUN
    assert len(RUN) > 8


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", RUN)
def test_command_does_what_its_page_says(
    command: str, in_copy: Callable[[str], "subprocess.CompletedProcess[str]"]
) -> None:
    if "emulated" in command and (lacking := missing_requirement()):
        pytest.skip(lacking)
    done = in_copy(command)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) > 1
