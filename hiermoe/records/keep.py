"""From what a run did to its record: rows, or why there are none."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hiermoe.records.checksums import Damaged
from hiermoe.records.provenance import collect
from hiermoe.records.status import NotApplicable, Status
from hiermoe.records.store import RunStore

NONE = "none"  # in the key columns of what has no system, model or routing
_NO_ROWS = {"iteration": -1, "routing_iteration": -1, "counted": False, "layer": -1, "phase": "run", "stage": "all"}


class RunDied(RuntimeError):
    """A rank failed in mid-run.

    Attributes:
        rows: what all ranks had measured before, of iterations that every rank finished.
    """

    def __init__(self, message: str, rows: pd.DataFrame) -> None:
        """Keep the rows beside the message."""
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run_id: its name in the store.
        status: ok, failed or not_applicable.
        reason: one line for the latter two.
        cached: whether the record was there already.
        seconds: time taken; of runs that were measured together, an equal share.
    """

    run_id: str
    status: Status
    reason: str
    cached: bool
    seconds: float


@dataclass(frozen=True)
class Entry:
    """What the record of a run has beside its rows.

    Attributes:
        run_id: name of the run.
        content: its configuration.
        keys: columns that all its rows share.
        provenance: what is to be told beside code, host and versions.
    """

    run_id: str
    content: dict[str, Any]
    keys: dict[str, Any]
    provenance: Mapping[str, Any]


def kept(run_id: str, store: RunStore) -> Outcome | None:
    """The outcome of a run that need not be run again; None of one that must be. Says so of a damaged record."""
    started = time.perf_counter()
    try:
        ended = store.ended(run_id)
    except Damaged as error:
        print(f"{error}: left out, and measured anew", file=sys.stderr)
        store.forget(run_id)  # or every process that works on it would say so
        return None
    if ended is None or ended[0] == "failed":
        return None
    return Outcome(run_id, *ended, True, time.perf_counter() - started)


class Attempt:
    """A context for whatever makes rows; what is expected to go wrong there becomes a status.

    Attributes:
        status: ok, failed or not_applicable.
        reason: one line for the latter two.
        rows: of a run that died, those that it had.
    """

    def __init__(self, status: Status = "ok", reason: str = "", share: int = 1) -> None:
        """Begin; ``share`` runs share the time. One that is refused before it begins has a status and a reason."""
        self.status: Status = status
        self.reason = reason
        self.rows = pd.DataFrame()
        self._share, self._seconds = share, 0.0
        self._started = time.perf_counter()

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        self._seconds = (time.perf_counter() - self._started) / self._share
        if isinstance(error, NotApplicable):
            self.status, self.reason = "not_applicable", str(error)
        elif isinstance(error, RunDied):
            self.status, self.reason, self.rows = "failed", str(error), error.rows
        elif isinstance(error, ValueError | OSError):
            self.status, self.reason = "failed", str(error)
        return error is None or self.status != "ok"

    def keep(self, entry: Entry, store: RunStore, rows: pd.DataFrame | None = None) -> Outcome:
        """Store the record.

        Args:
            entry: of the run.
            store: where records are.
            rows: without the entry's keys; None or empty for none: the record has one row with the reason.
        """
        rows = pd.DataFrame([_NO_ROWS]) if rows is None or rows.empty else rows
        rows = rows.assign(run_id=entry.run_id, **entry.keys, status=self.status, reason=self.reason)
        provenance = collect() | {"seconds": round(self._seconds, 3)} | dict(entry.provenance)
        store.write(entry.run_id, entry.content, provenance, rows)
        return Outcome(entry.run_id, self.status, self.reason, False, self._seconds)
