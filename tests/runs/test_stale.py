"""A record is stale when the present code would call its run by another name; a command renews it."""

import shlex
from pathlib import Path

import pytest
import yaml

from hiermoe.records import run_id as naming
from hiermoe.records.store import RunStore
from hiermoe.runs.calibration import calibration_config
from hiermoe.runs.compose import compose, expand
from hiermoe.runs.run_config import RunConfig
from hiermoe.runs.stale import Config, command_of, renewals, stale_runs
from hiermoe.runs.training import TrainRunConfig
from tests.conftest import Composer
from tests.records.test_store import rows

PROVENANCE = {"host": "elsewhere", "command": "hiermoe run something=else"}


def keep(store: RunStore, config: Config, host: str = "elsewhere") -> str:
    """A record of a run as it is named now, on a machine."""
    name = config.named_on(host, config.content)
    record = rows(**{"run_id": name, **config.keys})
    store.write(name, config.content, PROVENANCE | {"host": host}, record)
    return name


@pytest.fixture
def kept(composed: Composer, tmp_path: Path) -> tuple[RunStore, dict[str, str]]:
    """A store with a run of a sweep, two runs of no sweep, a measured one of another machine, and the other kinds."""
    store = RunStore(tmp_path / "runs")
    sizes = {"num_experts": 32, "topk": 4, "hidden_size": 64, "moe_ffn_hidden_size": 32}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"name": "small"} | sizes))  # nothing that trainings need
    configs: dict[str, Config] = {
        "sweep": expand("fig13")[0].config,
        "own": composed("system.policy.gamma=3.5", "model.topk=6"),
        "part": composed("cluster=gb200_nvl72_ib400", "world_size=512", "max_ep_size=64", "system=hd_moe"),
        "measured": composed("measure=replay", "ranks=local", "world_size=8", "system=hd2"),
        "calibration": calibration_config("a6000_4x8", "local", world_size="8"),
        "training": compose("train", ["system=hd2", "steps=3", "corpus_files=2", "world_size=4"], TrainRunConfig),
        "widths alone": composed(f"model={tmp_path / 'small.yaml'}", "routing=uniform", "system=hd2"),
        "self_test": compose("config", ["measure=self_test", "seed=3"], RunConfig),
    }
    return store, {kind: keep(store, config) for kind, config in configs.items()}


def test_records_of_the_present_code_are_not_stale(kept: tuple[RunStore, dict[str, str]]) -> None:
    assert stale_runs(kept[0]) == []


def test_whether_a_training_is_stale_is_found_out_without_its_text(
    kept: tuple[RunStore, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be packages that are to be downloaded first."""

    def read(*_: object) -> str:
        raise AssertionError("its text was read")

    monkeypatch.setattr("hiermoe.runs.training.corpus_key", read)
    assert stale_runs(kept[0]) == []


@pytest.mark.slow
def test_other_code_makes_all_records_stale_and_each_is_named_with_what_renews_it(
    kept: tuple[RunStore, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, names = kept
    monkeypatch.setattr(naming, "code_digest", lambda modules: "other")
    stale = stale_runs(store)
    assert {run.run_id for run in stale} == set(names.values())
    found = {run_id: renewal.command for renewal in renewals(stale) for run_id in renewal.run_ids}
    assert found[names["sweep"]] == "hiermoe reproduce --sweeps fig13"
    assert "model.topk=6" in found[names["own"]] and "system.policy.gamma=3.5" in found[names["own"]]
    assert "world_size=512" in found[names["part"]] and "max_ep_size=64" in found[names["part"]]
    assert found[names["calibration"]].startswith("hiermoe calibrate cluster=a6000_4x8 ranks=local world_size=8")
    assert found[names["training"]].startswith("hiermoe train system=hd2") and "steps=3" in found[names["training"]]
    assert "measure=self_test" in found[names["self_test"]] and "measure=replay" in found[names["measured"]]


@pytest.mark.parametrize("damage", ["no configuration", "empty configuration", "no provenance", "half a provenance"])
def test_a_folder_that_is_no_whole_record_is_passed_over(
    damage: str, kept: tuple[RunStore, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, names = kept
    configuration, provenance = (store.path(names["own"]) / name for name in ("config.yaml", "provenance.json"))
    match damage:
        case "no configuration":
            configuration.unlink()
        case "empty configuration":
            configuration.write_text("")
        case "no provenance":
            provenance.unlink()
        case _:
            provenance.write_text(provenance.read_text()[:20])
    monkeypatch.setattr(naming, "code_digest", lambda modules: "other")
    assert {run.run_id for run in stale_runs(store)} == set(names.values()) - {names["own"]}


def test_the_command_of_a_run_asks_for_that_run(composed: Composer) -> None:
    config = composed("system=hiermoe_multi", "cluster=h100_ib400", "world_size=16", "+system.executor=stock", "seed=2")
    command = command_of(config)
    assert command is not None
    again = compose("config", shlex.split(command)[2:], RunConfig)
    assert (again.content, again.run_id) == (config.content, config.run_id)


def test_what_no_command_line_says_is_renewed_by_what_made_it(composed: Composer, tmp_path: Path) -> None:
    store, config = RunStore(tmp_path), composed()
    cluster = config.cluster.model_copy(update={"world": None, "name": "gone"})
    name = config.run_id
    content = config.content | {"cluster": cluster.model_dump(mode="json")}
    store.write(name, content, PROVENANCE, rows(**{"run_id": name, **config.keys, "cluster": "gone"}))
    (renewal,) = renewals(stale_runs(store))
    assert (renewal.command, renewal.run_ids) == ("hiermoe run something=else", (name,))


def test_a_configuration_that_nobody_can_ask_for_is_stale(composed: Composer, tmp_path: Path) -> None:
    store, config = RunStore(tmp_path), composed()
    record = rows(**{"run_id": config.run_id, **config.keys})
    store.write(config.run_id, config.content | {"no_such_key": 1}, PROVENANCE, record)
    (stale,) = stale_runs(store)
    assert stale.config is None


def test_a_stale_record_that_has_been_renewed_asks_for_nothing(composed: Composer, tmp_path: Path) -> None:
    store, config = RunStore(tmp_path), composed()
    for name in ("of-other-code", config.run_id):
        store.write(name, config.content, PROVENANCE, rows(**{"run_id": name, **config.keys}))
    (stale,) = stale_runs(store)
    assert stale.run_id == "of-other-code" and stale.renewed and renewals([stale]) == []
