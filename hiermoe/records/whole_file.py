"""Files that are there whole or not at all, however many processes write them, and errors that name the file."""

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


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Have a file written whole or not at all: to a neighbour of the same suffix, flushed to disk, then renamed.

    Args:
        path: of the file; its folder is made.

    Yields:
        The path to write to.

    Raises:
        OSError: the disk is full or not writable; names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _neighbours([path]) as partial, naming(path):
        yield partial[path]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: as of :func:`whole`.
    """
    with whole(path) as partial:
        partial.write_bytes(content)


def write_all_whole(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files of a folder, none of which gets its name before all are on disk. Makes the folder.

    Raises:
        OSError: as of :func:`whole`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _neighbours([folder / name for name in contents]) as partial:
        for path, neighbour in partial.items():
            with naming(path):
                neighbour.write_bytes(contents[path.name])


@contextmanager
def _neighbours(paths: list[Path]) -> Iterator[dict[Path, Path]]:
    """Where to write files meanwhile; in the end all are flushed to disk and then renamed, or none is there."""
    partial = {path: path.with_name(f".{os.getpid()}.{path.name}") for path in paths}
    try:
        yield partial
        for path, neighbour in partial.items():
            with naming(path), neighbour.open("rb") as file:
                os.fsync(file.fileno())
        for path, neighbour in partial.items():
            neighbour.replace(path)
    finally:
        for neighbour in partial.values():
            with suppress(OSError):
                neighbour.unlink(missing_ok=True)
