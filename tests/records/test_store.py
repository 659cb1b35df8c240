"""Records survive what may go wrong while they are written."""

import errno
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pandera.errors
import pytest

from hiermoe.records.checksums import LIST
from hiermoe.records.run_id import run_id
from hiermoe.records.store import CONFIG, PROVENANCE, ROWS, RunStore


def rows(**changes: Any) -> pd.DataFrame:
    row = {
        "run_id": "r",
        "source": "simulated",
        "system": "megatron",
        "model": "m",
        "cluster": "c",
        "routing": "uniform",
        "seed": 0,
        "num_experts": 8,
        "topk": 2,
        "num_ranks": 4,
        "tokens_per_rank": 16,
        "iteration": 0,
        "routing_iteration": 0,
        "counted": True,
        "layer": 0,
        "phase": "step",
        "stage": "all",
        "predicted_ms": 1.5,
    }
    return pd.DataFrame([row | changes])


def test_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    written = store.write("r", {"a": 1}, {"b": 2}, rows())
    pd.testing.assert_frame_equal(store.read("r"), written)
    assert store.is_done("r") and not store.is_done("other")


def test_nan_stays_nan_and_is_not_read_as_zero(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.write("r", {}, {}, rows(predicted_ms=float("nan")))
    assert store.read("r")["predicted_ms"].isna().all()


def test_failed_run_keeps_a_row_and_is_tried_again(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.write("r", {}, {}, rows(phase="run", status="failed", reason="because"))
    assert store.ended("r") == ("failed", "because") and not store.is_done("r")
    assert store.read("r")["reason"].tolist() == ["because"]


@pytest.mark.parametrize("bad", [{"source": "guessed"}, {"phase": "x"}, {"predicted_ms": -1.0}, {"made_up": 1}])
def test_record_that_breaks_the_schema_is_refused(bad: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises((pandera.errors.SchemaError, ValueError)):
        RunStore(tmp_path).write("r", {}, {}, rows(**bad))
    assert RunStore(tmp_path).ended("r") is None and not RunStore(tmp_path).has("r")


def test_full_disk_loses_no_earlier_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(tmp_path)
    before = store.write("r", {}, {}, rows())

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        store.write("r", {}, {}, rows(predicted_ms=9.0))
    monkeypatch.undo()
    pd.testing.assert_frame_equal(store.read("r"), before)
    assert {path.name for path in store.path("r").iterdir()} == {CONFIG, PROVENANCE, ROWS, LIST}


def test_interruption_before_the_rename_leaves_the_earlier_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(tmp_path)
    before = store.write("r", {}, {}, rows())

    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write("r", {}, {}, rows(predicted_ms=9.0))
    monkeypatch.undo()
    pd.testing.assert_frame_equal(store.read("r"), before)


def test_run_id_follows_configuration_and_inputs_alone(tmp_path: Path) -> None:
    config = {"system": {"name": "s"}, "model": {"name": "m"}, "iterations": 4}
    trace = tmp_path / "a.trace"
    trace.write_bytes(b"one")
    same_content = tmp_path / "b.trace"
    same_content.write_bytes(b"one")
    missing = run_id(config, (), (tmp_path / "none",))
    assert run_id(config, (), (trace,)) == run_id(dict(reversed(config.items())), (), (same_content,))
    assert run_id(config | {"iterations": 5}, (), (trace,)) != run_id(config, (), (trace,))
    before = run_id(config, (), (trace,))
    trace.write_bytes(b"two!")
    assert run_id(config, (), (trace,)) not in (before, missing)
