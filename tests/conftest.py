"""Fixtures that every test may use."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from hiermoe.commands.cli import main
from hiermoe.ranks.server import preload
from hiermoe.records.store import RunStore
from hiermoe.runs.compose import compose
from hiermoe.runs.run_config import RunConfig
from hiermoe.topology.cluster import Cluster

preload("hiermoe.narrow.preload")  # ranks of tests need megatron too
preload("hiermoe.runs.training")  # and a training's configuration

# The documents' commands and tests that start ranks take longest. Begun first, they leave the short ones for the end,
# which keep all workers busy.
BEGUN_FIRST = ("slurm", "documents", "runs", "ranks", "megatron", "dispatch", "faults")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Prepare for several workers: tests of a file share what takes long to make, and stay on one worker.

    Files that share more than a file's tests do name a group.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name}/{item.path.stem}"))
    places = {folder: place for place, folder in enumerate(BEGUN_FIRST)}
    items.sort(key=lambda item: places.get(item.path.parent.name, len(places)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Make sure that groups count: else every worker would make for itself what takes long to make."""
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("this pytest-xdist ignores the groups of this pytest; constraints.txt has two that fit")


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
        return compose("config", [*small, *overrides], RunConfig)


@pytest.fixture
def composed() -> Composer:
    """A Composer."""
    return Composer()


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
