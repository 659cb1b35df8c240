"""Temporary folders that outlive nobody: the next one that is made beside them removes those whose owners are gone."""

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path

from hiermoe.records.whole_file import naming

_PREFIX = "hiermoe-"
_OWNER = ".owner"  # names the owner's host; locked by the owner, which the kernel undoes however it ends
_LONGEST_TMPDIR = 60  # bytes; the paths of sockets below it have at most 107


@contextmanager
def own_folder(where: Path) -> Iterator[Path]:
    """A temporary folder for as long as the context is entered; what killed processes left beside it goes.

    Args:
        where: an existing folder.

    Raises:
        OSError: the disk is full or not writable; names the folder.
    """
    _remove_abandoned(where)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=where))  # nobody takes it for abandoned before it is locked
    try:
        with (new / _OWNER).open("wb", buffering=0) as owner:
            with naming(new / _OWNER):
                owner.write(socket.gethostname().encode())
            with suppress(OSError):  # a file system without locks: then nobody can find out that it is abandoned either
                fcntl.flock(owner, fcntl.LOCK_EX)
            new = new.rename(where / f"{_PREFIX}{new.name.removeprefix('.new-')}")
            yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


@cache
def process_folder() -> Path:
    """A temporary folder of this process, for as long as it lives.

    Raises:
        OSError: as of :func:`own_folder`.
    """
    told = tempfile.gettempdir()
    stack = ExitStack()
    folder = stack.enter_context(own_folder(Path(told if len(os.fsencode(told)) <= _LONGEST_TMPDIR else "/tmp")))
    Finalize(None, stack.close, exitpriority=-200)  # after all processes have ended, which have sockets in it
    return folder


def _remove_abandoned(where: Path) -> None:
    """Remove folders of processes of this host that were killed."""
    for path in where.glob(f"{_PREFIX}*/{_OWNER}"):
        with suppress(OSError), path.open("r+b") as file:  # somebody else's, or it is going at this moment
            if file.read() == socket.gethostname().encode():  # a lock may be unknown to other hosts
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent, ignore_errors=True)
