"""Measured sweeps: which runs they have, which of them run together, and what stands beside each."""

from pathlib import Path

import pandas as pd
import pytest
import yaml
from rich.console import Console

from hiermoe.commands import reproduce_command
from hiermoe.narrow.record_config import RecordConfig
from hiermoe.ranks.server import RankFailedError
from hiermoe.records.project import CONF, SWEEPS
from hiermoe.records.store import RunStore
from hiermoe.runs.indexing import index_runs
from hiermoe.runs.measured_cells import (
    AMOUNTS,
    Amount,
    MeasuredCell,
    clusters_of,
    measured_cells,
    measured_so_far,
    together,
)


@pytest.fixture
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both emulated clusters, as if they had been calibrated."""
    for name in ("emulated_4x8", "emulated_4x2"):
        content = yaml.safe_load((CONF / "cluster" / f"{name}.yaml").read_text())
        (tmp_path / f"{name}_calibrated.yaml").write_text(yaml.safe_dump(content | {"name": f"{name}_calibrated"}))
    monkeypatch.setattr("hiermoe.records.groups.CLUSTERS", tmp_path)
    return tmp_path


def apart_from_iterations(cell: MeasuredCell) -> str:
    return cell.measured.config.model_dump_json(exclude={"iterations", "wandb"})


def test_every_amount_composes_and_full_has_all_of_default_with_more_iterations(calibrated: Path) -> None:
    cases = {amount: {apart_from_iterations(cell): cell for cell in measured_cells(amount)} for amount in AMOUNTS}
    assert cases["default"].keys() < cases["full"].keys() and not cases["quick"].keys() & cases["full"].keys()
    assert len(cases["default"]) == 7  # the paper's systems on one routing
    for case, cell in cases["default"].items():
        assert cell.measured.config.iterations < cases["full"][case].measured.config.iterations
    assert clusters_of("quick") == ["emulated_4x2_calibrated"]
    assert clusters_of("default") == ["emulated_4x8_calibrated"]
    assert clusters_of("full") == ["emulated_4x8_calibrated"]


def test_systems_on_the_same_tokens_run_together_and_nothing_else_does(calibrated: Path) -> None:
    groups = together(cell.measured.config for cell in measured_cells("default"))
    assert [len(group) for group in groups] == [7]
    for group in groups:
        assert len({config.routing.name for config in group}) == 1
        assert len({config.system.name for config in group}) == 7


def test_prediction_differs_from_its_measured_run_in_what_is_measured_alone(calibrated: Path) -> None:
    for cell in measured_cells("full"):
        measured, predicted = cell.measured.config, cell.predicted.config
        assert measured.ranks is not None and measured.ranks.name == "emulated"
        assert (measured.measure, predicted.measure) == ("replay", "predict")
        assert measured.model_copy(update={"measure": "predict", "ranks": None}) == predicted


def test_enough_iterations_count(calibrated: Path) -> None:
    for cell in measured_cells("full"):
        assert cell.measured.config.iterations >= 40  # half of them count


def test_every_measured_run_of_full_is_among_those_that_the_report_shows(calibrated: Path, tmp_path: Path) -> None:
    cells = measured_cells("full")
    for cell in cells:
        folder = tmp_path / "runs" / cell.measured.run_id
        folder.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"status": ["ok"]}).to_parquet(folder / "records.parquet")
    index = index_runs(RunStore(tmp_path / "runs"))
    for cell in cells:
        assert cell.measured.run_id in {run.run_id for run in index[cell.sweep]}, cell.sweep


def test_a_cluster_that_nobody_has_calibrated_is_an_error_and_not_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hiermoe.records.groups.CLUSTERS", tmp_path)
    with pytest.raises(ValueError, match=r"sweeps/measured/fig11.yaml: .*emulated_4x8_calibrated"):
        measured_cells("default")
    assert measured_so_far(RunStore(tmp_path / "runs")) == []


@pytest.mark.parametrize("amount", AMOUNTS)
def test_every_system_is_measured_beside_the_baseline(calibrated: Path, amount: Amount) -> None:
    for group in together(cell.measured.config for cell in measured_cells(amount)):
        assert "megatron" in {config.system.name for config in group}, group[0]


def test_a_run_that_several_sweeps_share_is_found_for_each(calibrated: Path, tmp_path: Path) -> None:
    cells = [cell for cell in measured_cells("full") if cell.sweep == "fig13"]
    shared = next(cell.measured.config for cell in cells if cell.measured.config.system.name == "hd_moe")
    folder = tmp_path / "runs" / shared.run_id
    folder.mkdir(parents=True)
    pd.DataFrame({"status": ["ok"]}).to_parquet(folder / "records.parquet")
    store = RunStore(tmp_path / "runs")
    assert {cell.sweep for cell in measured_so_far(store)} == {"arena", "fig11", "fig13", "pipelined", "table4"}


def test_of_runs_that_differ_in_iterations_alone_the_longer_ones_are_shown(calibrated: Path, tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    short = {cell.measured.config.run_id for cell in measured_cells("default")}
    long = {cell.measured.config.run_id for cell in measured_cells("full") if cell.sweep == "fig11"}
    for ids in (short, long):
        for run_id in ids:
            (store.path(run_id)).mkdir(parents=True)
            pd.DataFrame({"status": ["ok"]}).to_parquet(store.path(run_id) / "records.parquet")
        assert {cell.measured.config.run_id for cell in measured_so_far(store) if cell.sweep == "fig11"} == ids


def test_an_amount_that_was_broken_off_takes_no_system_from_a_whole_comparison(
    calibrated: Path, tmp_path: Path
) -> None:
    store = RunStore(tmp_path / "runs")
    short = {cell.measured.config.run_id for cell in measured_cells("default")}
    begun = {cell.measured.config.run_id for cell in measured_cells("full") if cell.sweep == "arena"}
    for run_id in short | begun:
        store.path(run_id).mkdir(parents=True)
        pd.DataFrame({"status": ["ok"]}).to_parquet(store.path(run_id) / "records.parquet")
    found = measured_so_far(store)
    assert {cell.measured.run_id for cell in found if cell.sweep == "fig11"} == short
    assert {cell.measured.run_id for cell in found if cell.sweep == "arena"} == begun


def test_a_new_calibration_names_its_runs_anew(calibrated: Path) -> None:
    before = {cell.measured.config.run_id for cell in measured_cells("quick")}
    path = calibrated / "emulated_4x2_calibrated.yaml"
    content = yaml.safe_load(path.read_text())
    content["world"]["beta_ms_per_byte"] *= 2
    path.write_text(yaml.safe_dump(content))
    assert not before & {cell.measured.config.run_id for cell in measured_cells("quick")}


def test_whole_steps_begin_with_a_model_that_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def record(config: RecordConfig, _command: str) -> None:
        trained.append(config.model.name)
        if len(trained) == 1:
            raise RankFailedError("rank 1 of 2 failed")
        (in_place / f"step-{config.last_step:08d}").mkdir(parents=True)

    in_place = tmp_path / "models"
    monkeypatch.setattr(reproduce_command, "record", record)
    monkeypatch.setattr(reproduce_command, "in_workplace", lambda _: in_place)
    session = reproduce_command.Session(RunStore(tmp_path), Console(quiet=True), workers=1, started=0.0)
    with pytest.raises(ValueError, match="training qwen3_30b_a3b_narrow for whole steps: rank 1 of 2 failed"):
        reproduce_command.train_routers(session)
    for _ in range(2):
        reproduce_command.train_routers(session)
    assert trained == 2 * ["qwen3_30b_a3b_narrow"]
    for name in ("end_to_end", "end_to_end_deepseek_v3"):  # each goes on from where such a recording ends
        swept = yaml.safe_load((SWEEPS / "train" / f"{name}.yaml").read_text())["hydra"]["sweeper"]["params"]
        (step,) = in_place.iterdir()
        assert swept["resume"] == f".cache/models/{swept['model']}/{step.name}"
