"""Signals that end a command: in one line and with exit code 128 + n, whenever they come and however often.

Imports nothing of weight, since a signal may come while the rest is imported.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_LONGEST_END_SECONDS = 30.0  # to end processes and remove folders; what takes longer hangs

_came: list[int] = []
_holds = 0


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command has come."""


def until_interrupted(program: Callable[[], object]) -> None:
    """Run a program, that a signal ends in one line. What is ignored at the start, as by nohup, stays ignored."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        program()
    except BaseException as error:  # what a library makes of an interrupt may be any error
        if not _came:
            raise
        _say_and_exit(error)
    finally:
        for number in ENDING:  # the work is done, and nothing is left to be interrupted
            signal.signal(number, signal.SIG_IGN)


def is_interrupted() -> bool:
    """Whether a signal has come; errors are its consequence then."""
    return bool(_came)


@contextmanager
def held() -> Iterator[None]:
    """Let a signal that comes meanwhile count at the end: what is half begun could not be ended."""
    global _holds
    _holds += 1
    try:
        yield
    finally:
        _holds -= 1
        if _came and not _holds and sys.exc_info()[0] is None:
            raise Interrupted


def _interrupt(number: int, _frame: FrameType | None) -> None:
    if _came:  # the second of two in a row; the command ends already
        return
    _came.append(number)
    hang = threading.Timer(_LONGEST_END_SECONDS, os._exit, (128 + number,))
    hang.daemon = True
    hang.start()
    if not _holds:
        raise Interrupted


def _say_and_exit(error: BaseException) -> NoReturn:
    number = _came[0]
    name = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    print(
        f"error: interrupted{name}; finished runs are kept, the same command goes on with the rest",
        file=sys.stderr,
        flush=True,
    )
    raise SystemExit(128 + number) from error
