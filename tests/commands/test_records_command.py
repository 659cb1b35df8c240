"""Records are printed, filtered, exported and explained; docs/records.md does what it says."""

import copy
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from hiermoe.records import run_id as naming
from hiermoe.records.project import CODE
from hiermoe.records.store import RunStore
from hiermoe.records.table import read_records
from hiermoe.runs.columns import column_meanings, meaning_of
from hiermoe.runs.execute import execute
from hiermoe.runs.run_config import RunConfig
from tests.conftest import Command, Composer

DOCS = (CODE / "docs" / "records.md").read_text()
SYSTEMS, TOKENS = ("megatron", "hd_moe", "hiermoe"), (64, 128, 256)
# What other sweeps have of the same systems, model, cluster and routing.
DECOYS = {"policy.gamma": 5.0, "policy.interval": 4, "topk": 4, "iterations": 6, "measure": "bound"}


def other(content: dict[str, Any], key: str, value: Any) -> RunConfig:
    """A run that differs in one option."""
    changed = copy.deepcopy(content)
    node = changed["system"]["policy"] if key.startswith("policy.") else changed["model"] if key == "topk" else changed
    node[key.removeprefix("policy.")] = value
    return RunConfig.of_content(changed)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """Every system with every number of tokens, and what must not be mixed with them."""
    store = RunStore(tmp_path_factory.mktemp("made") / "runs")
    for system in SYSTEMS:
        content = Composer()(f"system={system}").content
        configs = [other(content, "tokens_per_rank", tokens) for tokens in TOKENS]
        if system == "hiermoe":
            configs += [other(content, key, value) for key, value in DECOYS.items()]
        for config in configs:
            execute(config, store)
    return store


@pytest.fixture
def runs(made: RunStore, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    """The same, for commands of a test."""
    monkeypatch.setattr("hiermoe.records.store.RUNS", made.folder)
    return made


def commands(text: str) -> list[list[str]]:
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]


def test_docs_plot_has_the_true_values(
    hiermoe: Command, runs: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (export,) = [arguments for arguments in commands(DOCS) if "tokens_per_rank" not in arguments and len(arguments) > 9]
    small = ["iterations=4" if argument == "iterations=64" else argument for argument in export]
    code, out, err = hiermoe(*small)
    assert (code, err) == (0, "") and "steps.csv" in out
    (block,) = re.findall(r"^```python\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
    with mpl.rc_context({"backend": "agg"}):
        plt.figure()
        exec(compile(block, "docs/records.md", "exec"), {})
        lines = {line.get_label(): np.asarray(line.get_xydata()) for line in plt.gca().get_lines()}
        plt.close("all")
    assert set(lines) == set(SYSTEMS) and (tmp_path / "alltoall_over_tokens.png").exists()
    for system in SYSTEMS:
        content = Composer()(f"system={system}").content
        names = [other(content, "tokens_per_rank", tokens).run_id for tokens in TOKENS]
        true = [runs.read(name).query("phase == 'step' and counted")["predicted_ms"].mean() for name in names]
        assert lines[system].tolist() == [[tokens, pytest.approx(ms)] for tokens, ms in zip(TOKENS, true, strict=True)]


def test_the_plot_is_refused_where_a_filter_is_missing(
    hiermoe: Command, runs: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hiermoe("records", "system=hiermoe", "phase=step", "counted=true", "to=steps.csv")
    (block,) = re.findall(r"^```python\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
    with pytest.raises(AssertionError, match=r"system\.policy\.gamma"):
        exec(compile(block, "docs/records.md", "exec"), {})


def test_a_line_a_run_with_what_is_not_usual_in_eighty_columns(
    hiermoe: Command, runs: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = hiermoe("records", "system=hiermoe,megatron")
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 80 and "\x1b" not in out
    for told in ("system.policy.gamma=5", "topk=4", "measure=bound", "tokens_per_rank=128"):
        assert told in out
    _, filtered, _ = hiermoe("records", "system=hiermoe", "system.policy.gamma=5")
    assert "1 run," in filtered


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_export_has_every_row_and_column(ending: str, hiermoe: Command, runs: RunStore, tmp_path: Path) -> None:
    target = tmp_path / "more" / f"out.{ending}"
    assert hiermoe("records", f"to={target}")[0] == 0
    found, everything = (pd.read_csv if ending == "csv" else pd.read_parquet)(target), read_records(store=runs)
    assert list(found.columns) == list(everything.columns) and len(found) == len(everything)
    assert found["predicted_ms"].sum() == pytest.approx(everything["predicted_ms"].sum())


@pytest.mark.slow
def test_stale_records_are_left_out_counted_and_named_with_what_renews_them(
    hiermoe: Command, made: RunStore, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = next(run_id for run_id in made.run_ids() if run_id.startswith("hd_moe"))
    shutil.copytree(made.path(one), store.path(one))
    monkeypatch.setattr(naming, "code_digest", lambda modules: "other")
    code, out, _ = hiermoe("records")
    assert code == 0 and "none of 0 runs is as asked" in out and "1 stale" in out and "hiermoe run system=hd_moe" in out
    _, shown, _ = hiermoe("records", "stale=true")
    assert "1 run, " in shown and one in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokens=64"], "records have no column tokens; did you mean tokens_per_rank"),
        (["to=out.txt"], "to=out.txt: a file ends in .csv or .parquet"),
        (["stale=perhaps"], "stale=perhaps: true or false"),
        (["hiermoe"], "hiermoe: a filter is COLUMN=VALUE"),
    ],
)
def test_bad_filters_end_with_one_line(arguments: list[str], message: str, hiermoe: Command, runs: RunStore) -> None:
    code, out, err = hiermoe("records", *arguments)
    assert code == 2 and message in " ".join(err.split()) and out == ""


@pytest.mark.slow
def test_every_column_is_explained(hiermoe: Command, runs: RunStore) -> None:
    code, out, _ = hiermoe("records", "--columns")
    assert code == 0
    for name, meaning in column_meanings().items():
        assert len(meaning) > 3 and name in out
    for column in read_records(store=runs).columns:
        assert meaning_of(column)
    for word in ("predicted_ms", "system.policy.gamma", "cluster.levels.N.inter.alpha_ms", "ms, by the cost model"):
        assert word in out
