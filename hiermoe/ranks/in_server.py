"""Imported by the fork server before anything else: it, and all that comes from it, ends with whom it works for.

A process that is stopped runs no code of its own, so the kernel has to end it. What a terminal sends to all processes
of a command is left to the one that was started first.
"""

import ctypes
import os
import signal

from hiermoe.records.interrupts import ENDING

_PR_SET_PDEATHSIG = 1  # man 2 prctl
_SERVER = os.getpid()


def _die_with_parent() -> None:
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # of Linux alone
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _in_child() -> None:
    """Of the server's own children alone: theirs are their business."""
    if _fork_of == [_SERVER]:
        _die_with_parent()
        if os.getppid() != _SERVER:  # it ended before the kernel knew
            os._exit(1)


_fork_of = [0]


def _before() -> None:
    _fork_of[0] = os.getpid()


_die_with_parent()
for _number in set(ENDING) - {signal.SIGTERM}:  # by which multiprocessing ends processes
    signal.signal(_number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)  # the starter had blocked them, until now
os.register_at_fork(before=_before, after_in_child=_in_child)
