"""Fixtures that every test may use."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from hiermoe.commands.cli import main
from hiermoe.ranks.launch import preload
from hiermoe.records.project import CONF
from hiermoe.records.store import RunStore
from hiermoe.runs.run_config import RunConfig, parse, register_search_path
from hiermoe.topology.cluster import Cluster

preload("hiermoe.narrow.preload")  # ranks of tests need megatron too


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """What runs use too; sums do not depend on how many cores there are."""
    torch.set_num_threads(1)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    """An empty results store that commands of this test use too."""
    monkeypatch.setattr("hiermoe.records.store.RUNS", tmp_path / "runs")
    return RunStore()


class Composer:
    """Compose run configurations the way the command does."""

    def __call__(self, *overrides: str) -> RunConfig:
        """The checked configuration; small by default."""
        small = ["tokens_per_rank=64", "iterations=4", "routing=uniform", "wandb.mode=disabled"]
        return parse(compose("config", overrides=[*small, *overrides]), RunConfig)


@pytest.fixture
def composed() -> Iterator[Composer]:
    """A Composer inside Hydra's context."""
    register_search_path()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="test"):
        yield Composer()


@pytest.fixture(scope="session")
def a6000() -> Cluster:
    """The paper's testbed: 4 nodes x 8 RTX A6000."""
    return Cluster.named("a6000_4x8")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One folder of tokenised corpora for the whole session."""
    return str(tmp_path_factory.mktemp("corpus"))


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hiermoe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], store: RunStore) -> Command:
    """The command, on an empty store: takes its arguments, gives exit code, output and errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["hiermoe", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


@pytest.fixture
def loads_file(tmp_path: Path) -> Callable[[str], Path]:
    """Write a file of expert loads."""

    def write(text: str) -> Path:
        path = tmp_path / "loads.csv"
        path.write_text(text)
        return path

    return write
