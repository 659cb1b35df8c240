"""Sweeps that are laid on one configuration are those that Hydra composes; what only Hydra can compose is refused."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hiermoe.records import groups
from hiermoe.records.project import CONF, SWEEPS
from hiermoe.records.store import RunStore
from hiermoe.runs.compose import compose, expand_file, swept, with_entrants
from hiermoe.runs.run_config import RunConfig
from hiermoe.runs.training import TrainRunConfig
from tests.conftest import Command


def sweep_files() -> list[str]:
    return sorted(path.relative_to(SWEEPS).as_posix() for path in SWEEPS.rglob("*.yaml"))


@pytest.fixture
def clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Calibrated clusters with the constants of the uncalibrated ones, in the place of results/clusters/."""
    folder = tmp_path / "clusters"
    folder.mkdir()
    for path in (CONF / "cluster").glob("emulated_*.yaml"):
        text = path.read_text().replace(f"name: {path.stem}", f"name: {path.stem}_calibrated")
        (folder / f"{path.stem}_calibrated.yaml").write_text(text)
    monkeypatch.setattr("hiermoe.records.groups.CLUSTERS", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("file", sweep_files())
def test_runs_are_those_that_hydra_composes(
    file: str, clusters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells enough to meet every value of every parameter, as each is laid on by itself; and the last one."""
    path = SWEEPS / file
    if checkpoint := swept(path).get("resume"):
        (tmp_path / checkpoint).mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
    group = f"sweeps/{file}".rpartition("/")[0]
    config_name, schema = ("train", TrainRunConfig) if group == "sweeps/train" else ("config", RunConfig)
    cells = expand_file(path, config_name, schema)
    assert len(cells) > 1
    met: set[str] = set()
    for cell in cells:
        if met.issuperset(cell.overrides) and cell is not cells[-1]:
            continue
        met.update(cell.overrides)
        assert compose(config_name, [f"+{group}={path.stem}", *cell.overrides], schema) == cell.config, cell.overrides


def made(folder: Path, **params: object) -> Path:
    """A sweep's file; ``__`` in the place of what a Python name cannot hold."""
    path = folder / "made.yaml"
    values = {key.replace("add__", "+").replace("__", "."): value for key, value in params.items()}
    OmegaConf.save(OmegaConf.create({"hydra": {"sweeper": {"params": values}}}), path)
    return path


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"system": "megatron,nobody"}, "system=nobody is unknown"),
        ({"model__topc": "2,4"}, "model.topc: this configuration has no such key"),
        ({"add__model__topk": "2,4"}, "+model.topk: this configuration has such a key already"),
        ({"nothing__topk": "2,4"}, "nothing.topk: this configuration has no nothing"),
        ({"experiment": "table4_k6"}, "experiment: this configuration has no such group"),
        ({"add__system": "megatron"}, "only Hydra adds a group"),
        ({"system": "glob(h*)"}, "values with commas between them"),
        ({"model__topk": "2,999"}, "topk=999 exceeds num_experts=128"),
    ],
)
def test_what_cannot_be_laid_on_is_refused(params: dict[str, str], message: str, tmp_path: Path) -> None:
    path = made(tmp_path, **params)
    with pytest.raises(ValueError) as error:
        expand_file(path, "config", RunConfig)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def test_a_sweep_that_says_more_than_what_it_varies_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path, system="megatron,hd2")
    path.write_text(path.read_text() + "iterations: 3\n")
    with pytest.raises(ValueError, match=r"holds hydra\.sweeper\.params, and nothing else"):
        expand_file(path, "config", RunConfig)


def test_a_key_that_is_missing_is_added(tmp_path: Path) -> None:
    path = made(tmp_path, system="smartmoe", add__system__policy__patience="3,4")
    found = [cell.config.system.policy["patience"] for cell in expand_file(path, "config", RunConfig)]
    assert found == [3, 4]


def test_entrants_join_those_that_a_sweep_lists_on_hydras_command_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hiermoe: Command, store: RunStore
) -> None:
    assert with_entrants("system", "megatron", "hiermoe") == "megatron,hiermoe"
    monkeypatch.setattr(groups, "OWN", tmp_path / "conf")
    monkeypatch.setattr(groups, "SWEEP_FOLDERS", (tmp_path / "sweeps",))
    text = (CONF / "system" / "hd2.yaml").read_text()
    (tmp_path / "conf" / "system").mkdir(parents=True)
    (tmp_path / "conf" / "system" / "newcomer.yaml").write_text(
        text.replace("name: hd2", "name: newcomer\nentrant: true")
    )
    (tmp_path / "sweeps").mkdir()
    small = {"routing": "uniform", "iterations": 4, "tokens_per_rank": 16}
    path = made(tmp_path / "sweeps", system="${entrants:system, megatron,hd2}", **small)
    systems = ["megatron", "hd2", "newcomer"]
    assert [cell.config.system.name for cell in expand_file(path, "config", RunConfig)] == systems
    code, _, err = hiermoe("run", "-m", "+sweeps=made", "wandb.mode=disabled")
    assert code == 0, err
    assert sorted(run.name.split("-")[0] for run in store.folder.iterdir()) == sorted(systems)
