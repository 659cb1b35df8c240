"""`hiermoe train` goes on from its checkpoints, and its record is that of a run without a stop."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from hiermoe.records.project import CODE
from hiermoe.records.store import RunStore
from tests.conftest import Command
from tests.runs.test_train import TINY, configured

STEPS = 8
# The command with a store of its own. Its ranks wait after their first checkpoint, to be terminated there.
MAIN = """
import sys
import time
from pathlib import Path
import hiermoe.records.store
hiermoe.records.store.RUNS = Path(sys.argv.pop(1))
from hiermoe.commands.cli import main
from hiermoe.narrow.trainer import Trainer
save = Trainer.save
def save_and_wait(*args, **kwargs):
    save(*args, **kwargs)
    time.sleep(3600)
Trainer.save = save_and_wait
if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run of a second."""
    return [*TINY, "lr_warmup_steps=10", f"cache_dir={tmp_path_factory.mktemp('corpus')}"]


def only_run(store: RunStore) -> tuple[pd.DataFrame, dict]:
    """Record and provenance."""
    (folder,) = store.folder.iterdir()
    return store.read(folder.name), json.loads((folder / "provenance.json").read_text())


def losses(records: pd.DataFrame) -> list[float]:
    """Of all steps; every rank must have one row of each."""
    assert list(zip(records["rank"], records["iteration"], strict=True)) == [
        (rank, step) for rank in range(4) for step in range(records["iteration"].min(), records["iteration"].max() + 1)
    ]
    return records[records["rank"] == 0]["loss"].tolist()


@pytest.mark.slow
def test_a_command_that_was_terminated_goes_on_when_it_is_started_again(
    hiermoe: Command, tiny: list[str], store: RunStore, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    command = [
        "train",
        "system=hiermoe",
        f"steps={STEPS}",
        "checkpoint_every=4",
        f"checkpoint_dir={checkpoints}",
        *tiny,
    ]
    (tmp_path / "main.py").write_text(MAIN)
    first = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py"), str(store.folder), *command],
        cwd=CODE,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(CODE)},
    )
    while not list(checkpoints.glob("*/step-*")):
        assert first.poll() is None
        time.sleep(0.02)
    first.terminate()
    assert first.wait() != 0
    assert not store.folder.exists()
    code, _, err = hiermoe(*command)
    assert code == 0, err
    records, provenance = only_run(store)
    assert len(losses(records)) == STEPS
    assert Path(provenance["resumed_from"]).parent.parent == checkpoints
    saved = sorted(path.name for path in checkpoints.glob("*/step-*"))
    assert saved == [f"step-{STEPS - 4:08d}", f"step-{STEPS:08d}"]
    # Without the record everything is still there: nothing is trained again.
    for file in store.path(records["run_id"].iloc[0]).iterdir():
        file.unlink()
    code, _, err = hiermoe(*command)
    assert code == 0, err
    again, _ = only_run(store)
    assert again["train_step_ms"].tolist() == records["train_step_ms"].tolist()
    # From the beginning: the same losses, in one go.
    store.path(records["run_id"].iloc[0]).joinpath("records.parquet").unlink()
    code, _, err = hiermoe(*command, "resume=null", "checkpoint_every=null")
    assert code == 0, err
    whole, provenance = only_run(store)
    assert losses(whole) == losses(records)
    assert whole["moved_experts"].tolist() == records["moved_experts"].tolist()
    assert "resumed_from" not in provenance
    assert not list(checkpoints.glob("*/step-*"))


@pytest.mark.slow
def test_another_system_goes_on_from_a_given_checkpoint(
    hiermoe: Command, tiny: list[str], store: RunStore, tmp_path: Path
) -> None:
    def train(*overrides: str) -> pd.DataFrame:
        known = set(store.folder.iterdir()) if store.folder.exists() else set()
        code, _, err = hiermoe("train", *tiny, "dtype=fp64", f"checkpoint_dir={tmp_path / 'checkpoints'}", *overrides)
        assert code == 0 and "Warning" not in err, err
        (folder,) = set(store.folder.iterdir()) - known
        return store.read(folder.name)

    whole = train("system=hiermoe", "steps=6", "checkpoint_every=3", "checkpoint_keep=null")
    first, last = sorted((tmp_path / "checkpoints").glob("*/step-*"))
    rest = train("system=hd2", "steps=6", f"resume={first}")
    assert rest["iteration"].min() == 3
    assert losses(rest) == pytest.approx(losses(whole)[3:], rel=1e-9)
    assert rest[rest["counted"]]["iteration"].unique().tolist() == [5]  # half of its own steps are for warming up
    code, _, err = hiermoe("train", *tiny, "dtype=fp64", "steps=6", f"resume={last}")
    assert code == 2 and "steps=6 leave less than two" in err


@pytest.mark.slow
def test_a_policy_that_begins_on_anothers_checkpoint_counts_its_steps_from_there(
    hiermoe: Command, tiny: list[str], store: RunStore, tmp_path: Path
) -> None:
    """A search after its second step is one, though the training is in its fifth by then; it is not repeated."""
    folders = f"checkpoint_dir={tmp_path / 'checkpoints'}"
    code, _, err = hiermoe("train", *tiny, folders, "system=megatron", "steps=3", "checkpoint_every=3")
    assert code == 0, err
    (first,) = (tmp_path / "checkpoints").glob("megatron*/step-*")
    search = ["system=hiermoe_search_hidden", "system.policy.first_search=2", "system.policy.steps=3", folders]
    code, _, err = hiermoe("train", *tiny, *search, "steps=8", f"resume={first}", "checkpoint_every=7")
    assert code == 0, err
    (folder,) = store.folder.glob("hiermoe_search_hidden*")
    moved = store.read(folder.name).groupby("iteration")["moved_experts"].max()
    assert moved[moved > 0].index.tolist() == [5]  # decided after step 4, travelled beside step 5
    (later,) = (tmp_path / "checkpoints").glob("hiermoe_search_hidden*/step-*")
    code, _, err = hiermoe("train", *tiny, *search, "steps=10", f"resume={later}")
    assert code == 0, err
    (again,) = set(store.folder.glob("hiermoe_search_hidden*")) - {folder}
    assert store.read(again.name)["moved_experts"].sum() == 0


def test_a_checkpoint_that_is_none_is_refused_in_one_line(hiermoe: Command, tiny: list[str], tmp_path: Path) -> None:
    code, _, err = hiermoe("train", *tiny, f"resume={tmp_path}")
    assert code == 2 and "is not a checkpoint" in err and "Traceback" not in err


@pytest.mark.slow
def test_how_a_run_is_saved_does_not_name_it_but_where_it_starts_does(tiny: list[str], tmp_path: Path) -> None:
    reference = configured(*tiny).run_id
    for same in ("checkpoint_every=3", "checkpoint_keep=null", "checkpoint_dir=elsewhere", "resume=null"):
        assert configured(*tiny, same).run_id == reference
    names = set()
    for folder, content in (("a", "1"), ("b", "1"), ("a", "2")):
        start = tmp_path / folder / "step-00000003"
        start.mkdir(parents=True, exist_ok=True)
        (start / "common.pt").write_text(content)
        os.utime(start / "common.pt", (1, int(content)))
        names.add(configured(*tiny, f"resume={start}").run_id)
    assert len(names | {reference}) == 3
