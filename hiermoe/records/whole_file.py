"""Files that are there whole or not at all, and errors that name the file."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError that names no file, as that of a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a neighbour, flushed to disk, then renamed. Makes the folder.

    Raises:
        OSError: the disk is full or not writable; names the file.
    """
    write_all_whole(path.parent, {path.name: content})


def write_all_whole(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files of a folder, none of which gets its name before all are on disk. Makes the folder.

    Raises:
        OSError: the disk is full or not writable; names the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = {folder / name: folder / f".{name}.{os.getpid()}" for name in contents}
    try:
        for path, neighbour in partial.items():
            with naming(path), neighbour.open("wb") as file:
                file.write(contents[path.name])
                file.flush()
                os.fsync(file.fileno())
        for path, neighbour in partial.items():
            neighbour.replace(path)
    finally:
        for neighbour in partial.values():
            with suppress(OSError):
                neighbour.unlink(missing_ok=True)
