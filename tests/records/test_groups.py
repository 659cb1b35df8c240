"""A user's own files in the groups of conf/: they add to the suite's, and are runs like any other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hiermoe.records import groups, run_id
from hiermoe.records.groups import file_of, files_of, group_names, outside_of_conf
from hiermoe.records.project import CODE, CONF
from tests.conftest import Command, Composer

POLICY = """
from helper_of_mine import SWAPS
from hiermoe.policies.hierd_es import HierDESPolicy


class Mine(HierDESPolicy):
    pass
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with own systems, in the place of the one that commands are started in."""
    monkeypatch.setattr(groups, "OWN", tmp_path / "conf")
    monkeypatch.setattr(groups, "SWEEP_FOLDERS", (*groups.SWEEP_FOLDERS, tmp_path / "sweeps"))
    monkeypatch.setattr(run_id, "WORKPLACE", tmp_path)
    monkeypatch.setattr("hiermoe.commands.cli.WORKPLACE", tmp_path)
    (tmp_path / "conf" / "system").mkdir(parents=True)
    (tmp_path / "sweeps").mkdir()
    return tmp_path


@pytest.fixture
def with_code(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system whose policy is code beside it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (workplace / "policy_of_mine.py").write_text(POLICY)
    (workplace / "helper_of_mine.py").write_text("SWAPS = 1\n")
    policy = yaml.safe_load((CONF / "system" / "hiermoe.yaml").read_text())["policy"]
    add(workplace, "mine", "hiermoe", policy=policy | {"_target_": "policy_of_mine.Mine"})
    return workplace


def add(workplace: Path, name: str, like: str = "hd2", **changes: object) -> Path:
    content = yaml.safe_load((CONF / "system" / f"{like}.yaml").read_text()) | {"name": name, "label": name} | changes
    path = workplace / "conf" / "system" / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_own_files_stand_beside_the_suites(workplace: Path) -> None:
    before = files_of("system")
    path = add(workplace, "mine")
    assert files_of("system") == dict(sorted({**before, "mine": path}.items()))
    assert file_of("system", "mine") == path and ("system", path) in list(outside_of_conf())
    (workplace / "conf" / "new_group").mkdir()
    assert "new_group" in group_names() and files_of("new_group") == {}


def test_an_own_file_never_stands_for_one_of_the_suites(workplace: Path, hiermoe: Command) -> None:
    path = add(workplace, "mine").rename(workplace / "conf" / "system" / "hd2.yaml")
    code, _, err = hiermoe("run", "system=hd2", "wandb.mode=disabled")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{path}: there is a system of that name already, conf/system/hd2.yaml" in " ".join(err.split())


def test_own_system_and_own_sweep_run_by_name(with_code: Path) -> None:
    """By workers too: several runs are simulated by processes of their own."""
    sweep = {"hydra": {"sweeper": {"params": {"system": "megatron,mine", "routing": "uniform", "iterations": 4}}}}
    (with_code / "sweeps" / "both.yaml").write_text(yaml.safe_dump(sweep))
    called = [sys.executable, "-m", "hiermoe", "run", "-m", "+sweeps=both", "tokens_per_rank=16", "wandb.mode=disabled"]
    environment = os.environ | {"PYTHONPATH": str(CODE), "HIERMOE_HOME": str(with_code)}
    done = subprocess.run(called, cwd=with_code, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    runs = (with_code / "results" / "runs").iterdir()
    assert sorted(run.name.split("-")[0] for run in runs) == ["megatron", "mine"]


def test_own_code_beside_own_files_counts_in_the_names_of_runs(with_code: Path, composed: Composer) -> None:
    sys.path.append(str(with_code))

    def name() -> str:
        for function in (run_id.code_digest, run_id._read):
            function.cache_clear()
        return composed("system=mine").run_id

    first = name()
    (with_code / "helper_of_mine.py").write_text("# in other words\nSWAPS = 1\n")
    assert name() == first
    for theirs in ("torch", "yaml"):  # what lies beside, and the suite imports from elsewhere
        (with_code / f"{theirs}.py").write_text("VERSION = 0\n")
    assert name() == first
    (with_code / "helper_of_mine.py").write_text("SWAPS = 2\n")
    assert name() != first
