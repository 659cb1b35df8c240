"""Whatever can differ between two runs has a column in their records: none can be taken for another."""

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
from pydantic import BaseModel

from hiermoe.records.meanings import MEANINGS
from hiermoe.records.options import option_columns, options
from hiermoe.records.project import CONF
from hiermoe.records.run_id import run_id
from hiermoe.records.schema import RECORDS
from hiermoe.records.store import RunStore, with_options
from hiermoe.records.table import differing, read_records
from hiermoe.runs.calibration import CalibrationConfig, calibration_config
from hiermoe.runs.compose import compose
from hiermoe.runs.run_config import RunConfig
from hiermoe.runs.training import TrainRunConfig
from tests.conftest import Composer
from tests.records.test_store import rows

# From these no number comes: what is shown, what is told, and where a run keeps its files.
TOLD = {"label", "color", "placement_label", "placement_color", "entrant", "description", "source"}
KEPT_ELSEWHERE = {"corpus", "wandb", "cache_dir", "checkpoint_every", "checkpoint_keep", "checkpoint_dir", "resume"}
# A corpus counts by its name and by the digest of its text: tests/runs/test_train.py.
NAMES_ITS_FILE: dict[type[BaseModel], set[str]] = {CalibrationConfig: {"name"}}

Path_ = tuple[str | int, ...]


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def leaves(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every single value of a configuration, and where it stands."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
    else:
        for key, item in items:
            yield from leaves(item, (*path, key))


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return 7 if value is None else f"{value}_other"


def changed(content: dict[str, Any], path: Path_) -> dict[str, Any]:
    """The same with another value in one place."""
    content = copy.deepcopy(content)
    inner: Any = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = another(inner[path[-1]])
    return content


def is_told(path: Path_, value: Any) -> bool:
    return path[-1] in TOLD and not isinstance(value, dict)


def compositions() -> dict[str, tuple[str, ...]]:
    """By name what is composed, so that there is, together, every kind of system, model, routing and cluster."""
    found: dict[str, tuple[str, ...]] = {}
    found |= {f"{group}={name}": (f"{group}={name}",) for group in ("system", "routing") for name in names(group)}
    found |= {f"model={name}": (f"model={name}", "cluster=h100_ib400") for name in names("model")}
    found["ranks=local"] = ("measure=replay", "ranks=local", "world_size=8")
    found["world_size=512"] = ("cluster=gb200_nvl72_ib400", "world_size=512", "max_ep_size=64")
    found["measure=self_test"] = ("measure=self_test",)
    return found


COMPOSED = compositions()
COMMANDS = ("calibrate", "train")


@cache
def content_of(name: str) -> dict[str, Any]:
    if name == "calibrate":
        return calibration_config("emulated_4x2", "emulated").content
    if name == "train":
        training = compose("train", ["cluster=a6000_1x8", "world_size=8", "ranks=local"], TrainRunConfig)
        return training.model_dump(mode="json", exclude=KEPT_ELSEWHERE)
    small = ("iterations=4", "tokens_per_rank=64", "wandb.mode=disabled")
    return compose("config", [*small, *COMPOSED[name]], RunConfig).content


def fields(schema: Any, path: str = "") -> Iterator[str]:
    """Names of all options that a schema knows, without places in lists."""
    parts = [part for part in (schema, *get_args(schema)) if isinstance(part, type) and issubclass(part, BaseModel)]
    parts += [inner for part in get_args(schema) for inner in get_args(part) if isinstance(inner, type)]
    parts = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
    if path and not parts:
        yield path
    for part in parts:
        for name, field in part.model_fields.items():
            yield from fields(field.annotation, f"{path}.{name}" if path else name)


@pytest.mark.slow
@pytest.mark.parametrize("schema", [RunConfig, CalibrationConfig, TrainRunConfig])
def test_every_field_of_every_schema_is_a_column_or_known_to_change_no_number(schema: type[BaseModel]) -> None:
    found = {
        ".".join(part for part in name.split(".") if not part.isdigit())
        for composed in (*COMPOSED, *COMMANDS)
        for name in options(content_of(composed))
    }
    left_out = KEPT_ELSEWHERE | NAMES_ITS_FILE.get(schema, set())
    for name in fields(schema):
        if name.partition(".")[0] in left_out or name.rpartition(".")[2] in TOLD - {"source"}:
            continue
        above = {".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 2)}
        has = above & found or any(known.startswith(f"{name}.") for known in found)
        assert has or name.endswith(".source"), name


@pytest.mark.parametrize("name", [*COMPOSED, *COMMANDS])
def test_columns_tell_runs_apart_that_differ_in_one_option(name: str) -> None:
    content = content_of(name)
    before = option_columns(content)
    for path, value in leaves(content):
        assert (option_columns(changed(content, path)) == before) == is_told(path, value), path


def test_what_has_a_column_counts_for_the_name_and_what_has_none_does_not() -> None:
    content = content_of("system=hiermoe")
    name, one = run_id(content, ()), pd.DataFrame({"value": [1.0]})
    for path, value in leaves(content):
        other = changed(content, path)
        frames = [with_options(one, config) for config in (content, other)]
        columns = differing(pd.concat(frames, ignore_index=True).drop(columns="value"))
        assert bool(columns) == (run_id(other, ()) != name) == (not is_told(path, value)), path


@pytest.mark.slow
def test_filtering_by_four_names_cannot_hide_what_else_differs(composed: Composer, tmp_path: Path) -> None:
    store, base = RunStore(tmp_path), composed()
    variants = {
        "tokens_per_rank": "128", "iterations": "6", "seed": "1", "narrowed": "2", "measure": "bound",
        "model.topk": "4", "model.hidden_size": "4096", "model.element_bytes": "1", "model.router.score_function":
        "sigmoid", "system.policy.gamma": "5.0", "system.policy.interval": "4", "system.policy.max_function": "plain",
        "system.policy.gated": "true", "system.policy.max_swaps": "8", "+system.executor": "stock",
    }  # fmt: skip
    runs = [base, *(composed(f"{key}={value}") for key, value in variants.items())]
    for number, config in enumerate(runs):
        keys = {"run_id": config.run_id, **config.keys, "predicted_ms": 10.0 + number}
        store.write(config.run_id, config.content, {}, rows(**keys))
    four = {"system": "hiermoe", "model": "qwen3_30b_a3b_paper", "cluster": "a6000_4x8", "routing": "uniform"}
    mixed = read_records(four, store)
    assert mixed["run_id"].nunique() == len(runs)
    columns = differing(mixed)
    named = {"model.topk": "topk", "+system.executor": "system.executor"}
    assert {named.get(key, key) for key in variants} <= set(columns)
    settings = mixed.groupby(columns, dropna=False)["run_id"].nunique()
    assert len(settings) == len(runs) and settings.eq(1).all()
    for key, value in variants.items():
        (changed_run,) = read_records({**four, named.get(key, key): value}, store)["run_id"].unique()
        assert changed_run == composed(f"{key}={value}").run_id
    plain = {column: mixed.loc[mixed["run_id"] == base.run_id, column].iloc[0] for column in columns}
    assert set(read_records({**four, **plain}, store)["run_id"]) == {base.run_id}


def test_empty_cells_can_be_asked_for(composed: Composer, tmp_path: Path) -> None:
    store, runs = RunStore(tmp_path), (composed(), composed("cluster=h100_ib400", "world_size=8"))
    for config in runs:
        store.write(config.run_id, config.content, {}, rows(run_id=config.run_id, **config.keys))
    for wanted, config in zip(("null", 8), runs, strict=True):
        assert set(read_records({"world_size": wanted}, store)["run_id"]) == {config.run_id}
    assert len(read_records({"world_size": ["null", "8"]}, store)) == 2


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"tokens_per_rnk": 64}, "records have no column tokens_per_rnk; did you mean tokens_per_rank"),
        ({"topk": "many"}, "topk=many: this column holds a number"),
        ({"counted": "yes"}, "counted=yes: this column holds true or false"),
    ],
)
def test_what_records_do_not_have_is_refused(
    wanted: dict[str, Any], message: str, composed: Composer, tmp_path: Path
) -> None:
    config, store = composed(), RunStore(tmp_path)
    store.write(config.run_id, config.content, {}, rows(run_id=config.run_id, **config.keys))
    with pytest.raises(ValueError, match=message):
        read_records(wanted, store)


def test_record_that_contradicts_its_options_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="topk=2 in a record whose run has topk=4"):
        RunStore(tmp_path).write("r", {"model": {"topk": 4}}, {}, rows())


def test_names_do_not_depend_on_order_or_on_where_a_target_lies() -> None:
    one = {"a": 1, "policy": {"_target_": "baselines.smartmoe.SmartMoEPolicy", "interval": 10}}
    other = {"policy": {"interval": 10, "_target_": "elsewhere.smartmoe.SmartMoEPolicy"}, "a": 1}
    assert options(one) == options(other) == {
        "a": 1, "policy._target_": "smartmoe.SmartMoEPolicy", "policy.interval": 10,
    }  # fmt: skip
    assert json.dumps(options({"levels": []})) == '{"levels": "[]"}'


def test_every_column_of_a_record_is_explained_once() -> None:
    assert list(MEANINGS) == list(RECORDS.columns)
