"""Rows of a run on several ranks: every rank streams its own to a file, so that what it measured outlives it."""

import json
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import pandas as pd

from hiermoe.ranks.own_folder import own_folder
from hiermoe.ranks.world import Progress
from hiermoe.records.project import SCRATCH
from hiermoe.records.whole_file import naming, write_whole

_POLL_SECONDS = 0.2


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A temporary folder that every rank can read and write, on other machines too: below the results."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with own_folder(SCRATCH) as folder:
        yield folder


class RowStream:
    """One rank's rows, appended to a file iteration by iteration."""

    def __init__(self, folder: Path, rank: int, start: int = 0) -> None:
        """Start the rank's file.

        Args:
            folder: of all ranks' files.
            rank: of the world.
            start: first iteration that will be written; rows of earlier ones that the file has already stay.
        """
        self._path = path = _path(folder, rank)
        write_whole(path, b"".join(_line(rows) for rows in _finished(path) if rows[0]["iteration"] < start))
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._file.close()

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append all rows of one finished iteration; each has the key ``iteration``.

        Raises:
            OSError: the disk is full; names the file.
        """
        line = memoryview(_line(rows))
        with naming(self._path):
            while line:
                line = line[self._file.write(line) :]


@contextmanager
def streaming(rows: Path | None, progress: Progress) -> Iterator[Path]:
    """The folder that ranks stream to; rank 0's iterations are reported as they come.

    Args:
        rows: the folder; None for a temporary one.
        progress: called in this process with every iteration that rank 0 has finished.
    """
    with shared_folder() if rows is None else nullcontext(rows) as folder:
        done = threading.Event()
        watcher = threading.Thread(target=_follow, args=(folder, done, progress), daemon=True)
        watcher.start()
        try:
            yield folder
        finally:
            done.set()
            watcher.join()


def has_iterations(folder: Path, world_size: int, start: int) -> bool:
    """Whether the streams of all ranks reach up to the iteration before ``start``."""
    streams = [_finished(_path(folder, rank)) for rank in range(world_size)]
    return all(stream and stream[-1][0]["iteration"] >= start - 1 for stream in streams)


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.jsonl"


def _line(rows: Sequence[dict[str, Any]]) -> bytes:
    """An iteration, after a checksum by which a line is known to be whole."""
    content = json.dumps(rows).encode()
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _finished(path: Path) -> list[list[dict[str, Any]]]:
    """Iterations of a file up to the first line that is not whole."""
    iterations = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        content = line[9:-1]
        if line != b"%08x %s\n" % (zlib.crc32(content), content):
            break
        iterations.append(json.loads(content))
    return iterations


def collect(folder: Path, world_size: int, *, finished: bool = False) -> pd.DataFrame:
    """Rows of all ranks, of the iterations that every rank has finished.

    Args:
        folder: of all ranks' files.
        world_size: number of ranks.
        finished: all ranks have ended well, so that every one must have left the same iterations.

    Raises:
        OSError: some are missing; names the file.
    """
    ranks = [_finished(_path(folder, rank)) for rank in range(world_size)]
    common = min(len(iterations) for iterations in ranks)
    if finished:
        longest = max(len(iterations) for iterations in ranks)
        for path in (_path(folder, rank) for rank in range(world_size)):
            if not path.exists():
                raise OSError(f"{path} is gone: something removed it under the run, whose rows it had; run it again")
        for rank, iterations in enumerate(ranks):
            path = _path(folder, rank)
            lines = len(path.read_bytes().splitlines())
            if len(iterations) < max(lines, longest):
                raise OSError(
                    f"{path} was altered under the run: line {len(iterations) + 1} is not what rank {rank} wrote; "
                    "run it again"
                )
    return pd.DataFrame([row for iterations in ranks for rows in iterations[:common] for row in rows])


def _follow(folder: Path, done: threading.Event, progress: Progress) -> None:
    """Report rank 0's iterations as they come, until ``done``. Reads what is new alone: rank 0 may be this process."""
    reported, position, path = 0, 0, _path(folder, 0)
    while True:
        ended = done.wait(_POLL_SECONDS)
        if path.exists() and path.stat().st_size > position:
            with path.open("rb") as file:
                file.seek(position)
                new = file.read()
            position += len(new)
            for _ in range(new.count(b"\n")):
                progress(reported)
                reported += 1
        if ended:
            return
