"""Records that are not what was written are named, left out of reports and measured anew."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from hiermoe.records.checksums import LIST, checksum_list
from hiermoe.records.project import CODE
from hiermoe.records.store import CONFIG, PROVENANCE, ROWS, RunStore
from hiermoe.runs.compose import compose
from hiermoe.runs.execute import execute
from hiermoe.runs.run_config import RunConfig
from tests.conftest import Command

FEW = ["routing=uniform", "iterations=4", "tokens_per_rank=16", "wandb.mode=disabled"]
ASKED, OTHER = "system=hd2", "system=hd1"
Damage = Callable[[Path], object]


def flipped(name: str) -> Damage:
    """One bit in the middle."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return damage


def cut(name: str, share: float) -> Damage:
    return lambda folder: (folder / name).write_bytes((b := (folder / name).read_bytes())[: int(len(b) * share)])


def missing(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def of_the_other_run(*names: str) -> Damage:
    return lambda folder: [shutil.copy(folder.parent / "other" / name, folder / name) for name in names]


def replaced(name: str, old: str, new: str) -> Damage:
    def damage(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return damage


def a_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def rewritten(change: Callable[[pd.DataFrame], pd.DataFrame], signed: bool) -> Damage:
    """Other rows; ``signed``: by a writer that knew to renew the checksums."""

    def damage(folder: Path) -> None:
        change(pd.read_parquet(folder / ROWS)).to_parquet(folder / ROWS, index=False)
        if signed:
            run_id = (folder / LIST).read_text().partition(": run ")[2].splitlines()[0]
            digests = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in (CONFIG, PROVENANCE, ROWS)}
            (folder / LIST).write_bytes(checksum_list(f"run {run_id}", digests))

    return damage


def negative(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(predicted_ms=-rows["predicted_ms"])


INJECTIONS: list[tuple[str, Damage, str]] = [
    ("rows empty", cut(ROWS, 0), f"{ROWS} is empty"),
    ("rows cut in half", cut(ROWS, 0.5), f"{ROWS} is not what was written"),
    ("rows without their end", cut(ROWS, 0.99), f"{ROWS} is not what was written"),
    ("a bit of the rows", flipped(ROWS), f"{ROWS} is not what was written"),
    ("rows of another run", of_the_other_run(ROWS), f"{ROWS} is not what was written"),
    ("rows edited by hand", rewritten(negative, signed=False), f"{ROWS} is not what was written"),
    ("no rows", rewritten(lambda rows: rows.head(0), signed=True), f"{ROWS} has no rows"),
    ("another schema", rewritten(lambda rows: rows.drop(columns="phase"), signed=True), "has no column phase"),
    ("rows are a folder", a_folder(ROWS), f"{ROWS} cannot be read: Is a directory"),
    ("configuration empty", cut(CONFIG, 0), f"{CONFIG} is empty"),
    ("configuration cut", cut(CONFIG, 0.5), f"{CONFIG} is not what was written"),
    ("a bit of the configuration", flipped(CONFIG), f"{CONFIG} is not what was written"),
    ("no configuration", missing(CONFIG), f"{CONFIG} is missing"),
    ("configuration of another run", of_the_other_run(CONFIG), f"{CONFIG} is not what was written"),
    ("provenance empty", cut(PROVENANCE, 0), f"{PROVENANCE} is empty"),
    ("provenance cut", cut(PROVENANCE, 0.5), f"{PROVENANCE} is not what was written"),
    ("a bit of the provenance", flipped(PROVENANCE), f"{PROVENANCE} is not what was written"),
    ("no provenance", missing(PROVENANCE), f"{PROVENANCE} is missing"),
    ("no checksums", missing(LIST), "has no checksums"),
    ("checksums empty", cut(LIST, 0), f"{LIST} is not what was written"),
    ("checksums cut", cut(LIST, 0.5), f"{LIST} lacks {PROVENANCE}"),
    ("a later version", replaced(LIST, "format 1", "format 7"), "is of a later version, in format 7"),
    ("an earlier version", replaced(LIST, "format 1", "format 0"), "is of an earlier version, in format 0"),
    ("checksums of another run", of_the_other_run(LIST), "holds run hd1-"),
    ("the whole record of another run", of_the_other_run(CONFIG, PROVENANCE, ROWS, LIST), "holds run hd1-"),
    ("checksums no text", lambda folder: (folder / LIST).write_bytes(b"\xff\xfe\x00"), f"{LIST} cannot be read"),
]
injected = pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(damage, said, id=what, marks=pytest.mark.slow if place % 5 else ())
        for place, (what, damage, said) in enumerate(INJECTIONS)
    ],
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of two runs."""
    store = RunStore(tmp_path_factory.mktemp("pristine"))
    for system, name in ((ASKED, "asked"), (OTHER, "other")):
        outcome = execute(compose("config", [*FEW, system], RunConfig), store)
        assert outcome.status == "ok"
        (store.folder / name).symlink_to(store.path(outcome.run_id))
    return store.folder


@pytest.fixture
def record(pristine: Path, store: RunStore) -> Path:
    """The folder of the record that will be asked for, in the store that commands use; ``other`` lies beside it."""
    shutil.copytree((pristine / "other").resolve(), store.folder / "other")
    return Path(shutil.copytree(path := (pristine / "asked").resolve(), store.folder / path.name))


@injected
def test_damage_is_named_and_the_run_is_made_anew(
    damage: Damage, said: str, record: Path, pristine: Path, store: RunStore, hiermoe: Command
) -> None:
    damage(record)
    code, out, err = hiermoe("run", *FEW, ASKED)
    told = " ".join((out + err).split())
    assert code == 0 and "Traceback" not in told
    assert said in told and "left out, and measured anew" in told and record.name in told
    expected = RunStore(pristine).read(record.name)
    pd.testing.assert_frame_equal(store.read(record.name), expected)
    code, out, _ = hiermoe("run", *FEW, ASKED)
    assert code == 0 and "kept from before" in out


@pytest.mark.slow
@injected
def test_damage_is_listed_and_in_no_table(
    damage: Damage, said: str, record: Path, store: RunStore, hiermoe: Command
) -> None:
    damage(record)
    shutil.rmtree(record.parent / "other")
    assert list(store.damaged()) == [record.name]
    code, out, err = hiermoe("records")
    told = " ".join((out + err).split())
    assert code == 0 and "Traceback" not in told
    assert "1 damaged and left out" in told and said in told
    assert "all 1 runs in" in told and "runs is as asked" not in told
    assert "made by: " in told or "no command is told" in told


def test_a_record_without_rows_is_none(record: Path, hiermoe: Command) -> None:
    (record / ROWS).unlink()
    code, out, _ = hiermoe("run", *FEW, ASKED)
    assert code == 0 and "kept from before" not in out and "left out" not in out


def test_the_page_on_reliability_counts_these() -> None:
    assert f"({len(INJECTIONS)} injections)" in (CODE / "docs" / "reliability.md").read_text()
