"""Network namespaces without names.

A namespace lives for as long as a process is in it or a file that stands for it is open. Here only the creator holds
such a file, so the kernel removes the namespace, with all interfaces and queues in it, when the creator ends, however
it ends. There is nothing to find and clean up later, and two runs cannot collide.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
_CLONE_NEWNET = 0x40000000


class Namespace:
    """A new network namespace.

    Attributes:
        file: descriptor that stands for it.
        path: the same for other processes, for as long as this one has not closed it.
    """

    def __init__(self) -> None:
        """Make it.

        Raises:
            OSError: no permission.
        """

        def make() -> int:
            _call("unshare", _CLONE_NEWNET)  # this has nothing but a loopback interface that is down
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

        self.file = _in_thread(make)
        self.path = Path(f"/proc/{os.getpid()}/fd/{self.file}")

    def close(self) -> None:
        """Let go of it: it is gone once no process is in it."""
        os.close(self.file)

    def run(self, function: Callable[[], Result]) -> Result:
        """Call a function inside; sockets that it opens belong there for good."""

        def inside() -> Result:
            enter(self.path)
            return function()

        return _in_thread(inside)


def _in_thread(function: Callable[[], Result]) -> Result:
    """Call a function in a thread of its own, because a namespace belongs to a thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def enter(path: Path) -> None:
    """Move this thread, and all threads that it starts from now on, into a network namespace.

    Args:
        path: of the namespace, ``/proc/<pid>/ns/net`` or another file that stands for it.

    Raises:
        OSError: no such namespace, or no permission.
    """
    with path.open("rb") as file:
        _call("setns", file.fileno(), _CLONE_NEWNET)


def _call(name: str, *arguments: int) -> None:
    # Python has os.setns and os.unshare from 3.12 on.
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name} of a network namespace: {os.strerror(code)}")
