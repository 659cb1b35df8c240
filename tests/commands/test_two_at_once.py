"""Two processes that do the same at the same time: both end well, and what they leave is whole."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hiermoe.records.project import CODE
from hiermoe.records.store import RunStore
from hiermoe.records.whole_file import whole
from hiermoe.routing.trace import RoutingTrace

pytestmark = pytest.mark.slow
SMALL = ("system=hiermoe", "iterations=4", "tokens_per_rank=64", "wandb.mode=disabled")


def twice(folder: Path, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(CODE), "HIERMOE_HOME": str(folder)}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "hiermoe", *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    assert not list(folder.rglob(".[0-9]*.*"))


def test_the_same_run_on_ranks(tmp_path: Path) -> None:
    twice(tmp_path, "run", *SMALL, "measure=replay", "ranks=local", "world_size=2", "narrowed=64")
    store = RunStore(tmp_path / "results" / "runs")
    (run,) = store.run_ids()
    assert not store.read(run).duplicated(["iteration", "rank", "phase", "stage", "layer"]).any()
    assert store.provenance(run)["command"]


def test_the_same_report(tmp_path: Path) -> None:
    twice(tmp_path, "run", "-m", "+sweeps=table2", "iterations=4", "wandb.mode=disabled")
    twice(tmp_path, "report")
    assert (tmp_path / "reports" / "report.html").read_text().rstrip().endswith("</html>")


def test_the_same_import(tmp_path: Path) -> None:
    ids = np.stack([np.random.default_rng(seed).permutation(64)[:8] for seed in range(4096)]).astype(np.int16)
    np.save(tmp_path / "theirs.npy", ids[:, None])
    twice(tmp_path, "trace", "import", "npy", "theirs.npy", "--output", "ours.trace", "--num-experts", "64")
    assert RoutingTrace.load(tmp_path / "ours.trace").metadata.num_experts == 64


def test_a_file_that_fails_half_way_is_not_there_and_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with whole(tmp_path / "page.html") as partial:
            partial.write_text("<html>")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert not list(tmp_path.iterdir())
