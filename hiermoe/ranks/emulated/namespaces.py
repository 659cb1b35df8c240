"""Network namespaces without names.

A namespace lives for as long as a process is in it or a file that stands for it is open. Here only the creator holds
such a file, so the kernel removes the namespace, with all interfaces and queues in it, when the creator ends, however
it ends. There is nothing to find and clean up later, and two runs cannot collide.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hiermoe.ranks.network_namespace import enter, leave_for_new

Result = TypeVar("Result")


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
            leave_for_new()
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
    outcome: dict[str, Any] = {}

    def target() -> None:
        try:
            outcome["result"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
