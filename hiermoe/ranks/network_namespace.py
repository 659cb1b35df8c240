"""Linux network namespaces: a rank may live in one that is not its parent's."""

import ctypes
import os
from pathlib import Path

_CLONE_NEWNET = 0x40000000


def enter(path: Path) -> None:
    """Move this thread, and all threads that it starts from now on, into a network namespace.

    Args:
        path: of the namespace, ``/proc/<pid>/ns/net`` or another file that stands for it.

    Raises:
        OSError: no such namespace, or no permission.
    """
    with path.open("rb") as file:
        _call("setns", file.fileno(), _CLONE_NEWNET)


def leave_for_new() -> None:
    """Move this thread into a new network namespace, which has nothing but a loopback interface that is down.

    Raises:
        OSError: no permission.
    """
    _call("unshare", _CLONE_NEWNET)


def _call(name: str, *arguments: int) -> None:
    # Python has os.setns and os.unshare from 3.12 on.
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name} of a network namespace: {os.strerror(code)}")
