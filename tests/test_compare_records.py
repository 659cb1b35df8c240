"""The comparison of two stores finds what it must find."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from tests.compare_records import compare, main

OLD = {
    "system": {
        "name": "hiermoe",
        "label": "HierMoE",
        "policy": {"_target_": "hiermoe.planner.policy.HierDESPolicy", "interval": 1, "gated": False, "horizon": 100},
    },
    "cluster": {"name": "two", "description": "in words", "world": None},
    "backend": {"name": "simulated", "timeout_s": None, "device": "cpu"},
    "seed": 0,
}
NEW = {
    "system": {
        "name": "hiermoe",
        "color": "#123456",
        "policy": {"_target_": "hiermoe.policies.hierd_es.HierDESPolicy"},
    },
    "cluster": {"name": "two"},
    "measure": {"name": "predict"},
    "ranks": None,
    "seed": 0,
}
ROWS = {"source": "simulated", "system": "hiermoe", "model": "small", "routing": "uniform"}
ROWS |= {"predicted_ms": [0.1, np.nan], "moves": ["", "1>2 2>1"]}


def keep(folder: Path, name: str, config: dict[str, Any], **columns: Any) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    pd.DataFrame({"run_id": name, **ROWS, **columns}).to_parquet(run / "records.parquet")
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return keep(tmp_path / "old", "a", OLD, measured=True)


def test_equal_runs_find_each_other_whatever_they_are_called(old: Path, tmp_path: Path) -> None:
    new = keep(tmp_path / "new", "b", NEW, counted=True)
    found = compare(old, new)
    assert (found.compared, found.num_values, found.differences, found.without_partner) == (1, 14, [], [])
    assert main([str(old), str(new)]) == 0


def test_one_ulp_is_a_difference(old: Path, tmp_path: Path) -> None:
    new = keep(tmp_path / "new", "b", NEW, counted=True, predicted_ms=[np.nextafter(0.1, 1.0), np.nan])
    (line,) = compare(old, new).differences
    assert "predicted_ms, 1 of 2 rows: row 0: 0.1 -> 0.10000000000000002" in line
    assert main([str(old), str(new)]) == 1


def test_nan_in_the_place_of_a_number_is_a_difference(old: Path, tmp_path: Path) -> None:
    new = keep(tmp_path / "new", "b", NEW, counted=True, predicted_ms=[np.nan, np.nan])
    assert len(compare(old, new).differences) == 1


def test_rows_and_columns_that_stand_in_one_store_alone_are_differences(old: Path, tmp_path: Path) -> None:
    new = keep(tmp_path / "new", "b", NEW, counted=True, invented=1.0)
    assert len(compare(old, new).differences) == 1
    fewer = keep(tmp_path / "fewer", "b", NEW, counted=[True], predicted_ms=[0.1], moves=[""])
    assert len(compare(old, fewer).differences) == 1


def test_run_without_partner_is_found(old: Path, tmp_path: Path) -> None:
    other = NEW | {"seed": 1}
    new = keep(keep(tmp_path / "new", "b", NEW, counted=True), "c", other, counted=True)
    assert compare(old, new).without_partner == ["new c"]
    assert main([str(old), str(new)]) == 1
    assert compare(new, old).without_partner == ["old c"]
    assert main([str(new), str(old)]) == 1


def test_stores_with_nothing_to_compare_are_not_equal(tmp_path: Path) -> None:
    assert main([str(tmp_path), str(tmp_path)]) == 1


def test_other_argument_of_a_policy_is_another_run(old: Path, tmp_path: Path) -> None:
    system = {**NEW["system"], "policy": {"_target_": "hiermoe.policies.hierd_es.HierDESPolicy", "gated": True}}
    found = compare(old, keep(tmp_path / "new", "b", NEW | {"system": system}, counted=True))
    assert found.compared == 0 and len(found.without_partner) == 2


def test_every_run_of_one_meaning_is_compared(old: Path, tmp_path: Path) -> None:
    new = keep(tmp_path / "new", "b", NEW, counted=True)
    keep(new, "c", NEW, counted=[True, False])
    found = compare(old, new)
    assert found.compared == 2 and len(found.differences) == 1


def test_self_test_is_known_by_its_cluster_alone(tmp_path: Path) -> None:
    old = keep(tmp_path / "old", "a", OLD | {"backend": {"name": "synthetic_timings"}}, measured=True)
    config = {"measure": "self_test", "cluster": NEW["cluster"], "seed": 0}
    new = keep(tmp_path / "new", "b", config, counted=True, system="none", model="none", routing="none")
    assert compare(old, new).equal
    another = keep(tmp_path / "another", "b", config | {"seed": 1}, counted=True)
    assert not compare(old, another).equal


def test_measured_runs_are_left_out(old: Path, tmp_path: Path) -> None:
    new = keep(keep(tmp_path / "new", "b", NEW, counted=True), "c", NEW, source="local", counted=True)
    found = compare(old, new)
    assert found.compared == 1 and found.left_out == {"measured (local)": 1}
