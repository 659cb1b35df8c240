"""Full disks, and files that are removed or altered under a run: one line that names the file, and rows are kept."""

import fcntl
import os
import shutil
import socket
import subprocess
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hiermoe.ranks import launch, own_folder
from hiermoe.ranks.launch import run_ranks
from hiermoe.ranks.places import NewRanks
from hiermoe.ranks.streams import RowStream, collect
from hiermoe.records.keep import RunDied
from hiermoe.records.project import CODE
from hiermoe.topology.hierarchy import Hierarchy
from tests.conftest import Command
from tests.faults.test_damaged_records import FEW
from tests.faults.test_processes import ended

LONG = timedelta(hours=1)
NO_FILE = "[Errno 2] No such file or directory:"
NO_SPACE = "[Errno 28] No space left on device:"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system of its own")


def write_three(folder: Path) -> None:
    for rank in range(2):
        with RowStream(folder, rank) as stream:
            for iteration in range(3):
                stream.write([{"iteration": iteration, "rank": rank}])


def altered(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def line_of(content: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(content), content)


STREAMS: list[tuple[str, Callable[[Path], object], str, int]] = [
    ("a stream is gone", lambda path: path.unlink(), "is gone", 0),
    ("the folder of streams is gone", lambda path: shutil.rmtree(path.parent), "is gone", 0),
    ("a stream is empty", altered(lambda text: b""), "line 1 is not what rank 1 wrote", 0),
    ("a line is cut", altered(lambda text: text[:-9]), "line 3 is not what rank 1 wrote", 2),
    ("the end of a line is missing", altered(lambda text: text[:-1]), "line 3 is not what rank 1 wrote", 2),
    ("a line is missing", altered(lambda text: b"".join(text.splitlines(True)[:2])), "line 3 is not", 2),
    ("a bit of a line", altered(lambda text: text.replace(b'"iteration": 1', b'"iteration": 3')), "line 2 is not", 1),
    ("zeros in a line", altered(lambda text: text[:20] + bytes(9) + text[29:]), "line 1 is not", 0),
    ("half a line more", altered(lambda text: text + b"01234567 [{"), "line 4 is not what rank 1 wrote", 3),
    ("a line more", altered(lambda text: text + line_of(b"[]")), "rank-0.jsonl was altered", 3),
]


@pytest.mark.parametrize(("damage", "said", "left"), [pytest.param(*row[1:], id=row[0]) for row in STREAMS])
def test_a_stream_is_whole_or_refused(damage: Callable[[Path], object], said: str, left: int, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write_three(folder)
    assert len(collect(folder, 2, finished=True)) == 6
    damage(folder / "rank-1.jsonl")
    with pytest.raises(OSError, match=said) as refused:
        collect(folder, 2, finished=True)
    assert "run it again" in str(refused.value) and len(str(refused.value).splitlines()) == 1
    assert len(collect(folder, 2)) == 2 * left  # of a run that died


Small = Callable[..., Path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Small]:
    """Makes a file system of few bytes."""
    folder = tmp_path / "disk"

    def mount(size: str, *options: str) -> Path:
        folder.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "tmpfs", folder], check=True
        )
        return folder

    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


def large_result(rank: int, *_: Any) -> torch.Tensor:
    dist.barrier()
    if rank == 1:
        return torch.zeros(10**6)
    dist.barrier()  # it waits for the other
    return torch.zeros(1)


def large_job(rank: int, sent: torch.Tensor) -> None:
    raise AssertionError("it does not begin")


def fill(rank: int, folder: Path) -> None:
    if rank == 1:
        with suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        raise ValueError("no room for token 7")
    dist.barrier()


def remove(rank: int, folder: Path) -> None:
    if rank == 1:
        for scratch in folder.glob("ranks-*"):
            shutil.rmtree(scratch)
        return
    dist.barrier()


def stream_rows(rank: int, folder: Path) -> None:
    with RowStream(folder, rank) as stream:
        for iteration in range(10**6):
            stream.write([{"iteration": iteration, "text": "x" * 200}])
            dist.barrier()


def stream_and(rank: int, what: str, folder: Path) -> None:
    with RowStream(folder, rank) as stream:
        for iteration in range(4):
            stream.write([{"iteration": iteration}])
            dist.barrier()
            if rank == 1 and iteration == 1:
                path = folder / "rank-0.jsonl"
                if what == "removed":
                    path.unlink()
                elif what == "cut":
                    os.truncate(path, 40)
                else:
                    shutil.rmtree(folder)
            dist.barrier()


FAILED = "rank 1 of 2 failed"
WHY_NOT = f"{FAILED} and could not write why to {{disk}}"
SCRATCH = [
    pytest.param("64k", large_job, f"{NO_SPACE} '{{disk}}/ranks-", id="no room for the job"),
    pytest.param("256k", large_result, f"{FAILED}: OSError: {NO_SPACE} '{{disk}}/ranks-", id="no room for a result"),
    pytest.param("256k", fill, WHY_NOT, id="a rank fills the scratch"),
    pytest.param("256k", remove, f"{FAILED}: FileNotFoundError: {NO_FILE} '{{disk}}/", id="the scratch is removed"),
]


@as_root
@pytest.mark.slow
@pytest.mark.parametrize(("size", "function", "said"), SCRATCH)
def test_scratch_that_is_full_or_gone_is_named(
    size: str, function: Any, said: str, small_disk: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(size)
    monkeypatch.setattr(launch, "process_folder", lambda: disk)
    argument = torch.zeros(10**6) if function is large_job else disk
    assert ended(lambda: run_ranks(function, 2, (argument,), LONG)).startswith(said.format(disk=disk))
    assert not list(disk.glob("ranks-*"))


@as_root
@pytest.mark.slow
def test_a_full_disk_of_streams_is_named_and_what_was_measured_is_kept(small_disk: Small) -> None:
    disk = small_disk("64k")
    ranks = NewRanks(Hierarchy((2,)), LONG)
    with pytest.raises(RunDied) as died:
        ranks.run(stream_rows, (), rows=disk)
    assert "No space left on device: '" + str(disk) in str(died.value) and len(died.value.rows) > 20


UNDER = [
    pytest.param("removed", "rank-0.jsonl is gone", id="a stream removed under a run"),
    pytest.param("cut", "rank-0.jsonl was altered under the run", id="a stream cut under a run"),
    pytest.param("all", "rank-0.jsonl is gone", id="all streams removed under a run"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("what", "said"), UNDER)
def test_streams_that_are_removed_or_cut_under_a_run_are_named(what: str, said: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    line = ended(lambda: NewRanks(Hierarchy((2,)), LONG).run(stream_and, (what,), rows=rows))
    assert said in line and "run it again" in line


@as_root
@pytest.mark.parametrize("options", [("nr_inodes=1",), ("ro",)], ids=["no room for a folder", "a disk to read only"])
def test_a_folder_that_cannot_be_made_is_named(options: tuple[str, ...], small_disk: Small) -> None:
    disk = small_disk("64k", *options)
    with pytest.raises(OSError, match=str(disk)), own_folder.own_folder(disk):
        pass


@as_root
def test_a_record_that_the_disk_has_no_room_for_is_named(
    small_disk: Small, hiermoe: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk("8k")
    monkeypatch.setattr("hiermoe.records.store.RUNS", disk)
    code, out, err = hiermoe("run", *FEW)
    told = " ".join((out + err).split())
    assert code == 2 and f"error: {NO_SPACE} '{disk}" in told and "Traceback" not in told
    assert not [path for path in disk.rglob("*") if path.is_file() and path.stat().st_size]


def left_by(owner: bytes, where: Path) -> Path:
    folder = where / "hiermoe-left"
    folder.mkdir()
    (folder / ".owner").write_bytes(owner)
    return folder


HERE = socket.gethostname().encode()
FOLDERS = [
    pytest.param(HERE, False, False, id="folder of a killed process"),
    pytest.param(HERE, True, True, id="folder of a living process"),
    pytest.param(b"elsewhere", False, True, id="folder of another host"),
    pytest.param(b"", False, True, id="folder of nobody"),
]


@pytest.mark.parametrize(("owner", "locked", "stays"), FOLDERS)
def test_folders_of_killed_processes_are_removed_and_no_others(
    owner: bytes, locked: bool, stays: bool, tmp_path: Path
) -> None:
    left = left_by(owner, tmp_path)
    with (left / ".owner").open("rb") as file:
        if locked:
            fcntl.flock(file, fcntl.LOCK_EX)
        with own_folder.own_folder(tmp_path) as own:
            assert own.is_dir() and left.exists() == stays
    assert not own.exists() and left.exists() == stays


COUNT = sum(map(len, (STREAMS, SCRATCH, UNDER, FOLDERS))) + 4


def test_the_page_on_reliability_counts_these() -> None:
    assert f"({COUNT} injections)" in (CODE / "docs" / "reliability.md").read_text()
