"""A checkpoint that is not what was written is refused by name; training that has diverged ends."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hiermoe.megatron.checkpoint_folder import check_files, checkpoint_path, file_names, write_checksums
from hiermoe.ranks.streams import RowStream
from hiermoe.records.checksums import LIST, Damaged, digest_of
from hiermoe.records.project import CODE
from hiermoe.runs.compose import compose
from hiermoe.runs.training import TrainRunConfig
from tests.conftest import Command
from tests.faults.test_damaged_records import Damage, cut, flipped, missing, replaced
from tests.runs.test_train import TINY

SHARD = "__0_0.distcp"


def renamed(folder: Path) -> None:
    shutil.copytree(folder, checkpoint_path(folder.parent, 9))
    shutil.rmtree(folder)


INJECTIONS: list[tuple[str, Damage, str]] = [
    ("a bit of a shard", flipped(SHARD), f"{SHARD} is not what was written"),
    ("a shard cut", cut(SHARD, 0.9), f"{SHARD} is not what was written"),
    ("a shard empty", cut(SHARD, 0), f"{SHARD} is not what was written"),
    ("no shard", missing(SHARD), f"{SHARD} is missing"),
    ("a bit of the metadata", flipped("metadata.json"), "metadata.json is not what was written"),
    ("a file more", lambda folder: (folder / "more").write_text("x"), f"{LIST} lacks more"),
    ("no checksums", missing(LIST), "has no checksums"),
    ("a later version", replaced(LIST, "format 1", "format 2"), "is of a later version"),
    ("of another step", renamed, "holds checkpoint after 3 steps"),
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = checkpoint_path(tmp_path, 3)
    folder.mkdir()
    (folder / SHARD).write_bytes(bytes(range(256)) * 64)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    write_checksums(folder, 3, {name: digest_of(folder, name) for name in file_names(folder)})
    return folder


@pytest.mark.parametrize(("damage", "said"), [pytest.param(d, s, id=what) for what, d, s in INJECTIONS])
def test_damage_is_named(damage: Callable[[Path], object], said: str, checkpoint: Path) -> None:
    check_files(checkpoint)
    damage(checkpoint)
    (left,) = checkpoint.parent.iterdir()
    with pytest.raises(Damaged, match=said.replace(".", r"\.")):
        check_files(left)


def test_the_page_on_reliability_counts_these() -> None:
    assert f"({len(INJECTIONS)} injections)" in (CODE / "docs" / "reliability.md").read_text()


def kept(folder: Path, rows: Path, *steps: int) -> None:
    """What a killed run of one rank has left: checkpoints, and rows that reach up to the last."""
    for step in steps:
        checkpoint = checkpoint_path(folder, step)
        checkpoint.mkdir(parents=True)
        (checkpoint / SHARD).write_bytes(bytes([step]) * 4096)
        write_checksums(checkpoint, step, {SHARD: digest_of(checkpoint, SHARD)})
    for rank in range(4):
        with RowStream(rows, rank) as stream:
            for step in range(max(steps)):
                stream.write([{"iteration": step}])


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole_and_never_silently_from_the_beginning(
    tiny: list[str], tmp_path: Path
) -> None:
    config = compose(
        "train", [*tiny, f"checkpoint_dir={tmp_path}", "checkpoint_every=1", "resume=latest"], TrainRunConfig
    )
    folder = config.checkpoints().folder
    assert config.checkpoints().start is None
    kept(folder, folder.with_name(f"{folder.name}-rows"), 2, 4, 6)
    assert config.checkpoints().start == checkpoint_path(folder, 6)
    flipped(SHARD)(checkpoint_path(folder, 6))
    saved = config.checkpoints()
    assert saved.start == checkpoint_path(folder, 4)
    assert saved.left_out == (f"{checkpoint_path(folder, 6)}: {SHARD} is not what was written",)
    for step in (2, 4):
        cut(SHARD, 0)(checkpoint_path(folder, step))
    with pytest.raises(ValueError, match="no whole checkpoint is left, resume=null begins anew"):
        config.checkpoints()


@pytest.fixture
def tiny(cache_dir: str) -> list[str]:
    return [*TINY, "lr_warmup_steps=1", f"cache_dir={cache_dir}"]


@pytest.mark.slow
def test_training_does_not_go_on_from_a_damaged_checkpoint_that_it_was_told_to_take(
    tiny: list[str], hiermoe: Command, tmp_path: Path
) -> None:
    saving = [*tiny, f"checkpoint_dir={tmp_path}", "checkpoint_every=1"]
    code, _, err = hiermoe("train", *saving, "steps=3")
    assert code == 0, err
    newest = max(tmp_path.glob("*/step-*"))
    (shard, *_) = sorted(newest.glob("*.distcp"))
    flipped(shard.name)(newest)
    code, _, err = hiermoe("train", *tiny, "steps=5", f"resume={newest}")
    assert code == 2 and len(err.splitlines()) == 1
    assert f"{shard.name} is not what was written" in err


@pytest.mark.slow
def test_training_that_diverges_ends_with_what_was_last_finite(tiny: list[str], hiermoe: Command) -> None:
    code, _, err = hiermoe("train", *tiny, "steps=5", "learning_rate=1e30")
    assert code == 2 and "Traceback" not in err
    assert "training has diverged in step" in err and "the last finite loss is" in err
