"""Runs that were begun and did not end: one that kills the job it runs in must not kill every later job too."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from hiermoe.ranks.crew import CrewEnded
from hiermoe.records.project import shown
from hiermoe.records.store import RunStore
from hiermoe.records.whole_file import write_whole

MOST_ATTEMPTS = 2


class Attempts:
    """Marks in the folders of runs, ``started-<n>.json``: there while a run is under way, and where it never ended."""

    def __init__(self, store: RunStore, job: str) -> None:
        """Marks in a store.

        Args:
            store: where runs are.
            job: what the reader of a reason may look up: the number of a job.
        """
        self._store = store
        self._job = job
        self._under_way: list[Path] = []

    def unfinished(self, run_id: str) -> list[Path]:
        """Marks of attempts that never ended, oldest first."""
        return sorted(self._store.path(run_id).glob("started-*.json"))

    def reason_to_skip(self, run_id: str) -> str | None:
        """Why a run is not tried any more; None where it is."""
        marks = self.unfinished(run_id)
        if len(marks) < MOST_ATTEMPTS:
            return None
        told = "; ".join(_told(mark) for mark in marks)
        folder = shown(self._store.path(run_id))
        return f"ended the job {len(marks)} times ({told}); remove {folder}/started-*.json to try again"

    @contextmanager
    def of(self, run_ids: Sequence[str]) -> Iterator[None]:
        """Mark runs as under way. The marks stay if the crew ends meanwhile, or this process does without a word.

        They go if the runs end, well or not, and if the job is told to stop: that is not the runs' fault.
        """
        mark = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "job": self._job, "pid": os.getpid()}
        for run_id in run_ids:
            path = self._store.path(run_id) / f"started-{len(self.unfinished(run_id)) + 1}.json"
            write_whole(path, json.dumps(mark | {"reason": ""}).encode())
            self._under_way.append(path)
        try:
            yield
        except CrewEnded as error:
            for path in self._under_way:
                write_whole(path, json.dumps(mark | {"reason": str(error)}).encode())
            self._under_way = []
            raise
        except BaseException:
            self.excuse()
            raise
        self.excuse()
        for run_id in run_ids:
            _remove(self.unfinished(run_id))

    def excuse(self, *_signal: object) -> None:
        """Take the marks of what is under way back; also a handler of the signal by which Slurm announces a job's end.

        The process goes on: whether it is killed soon or may end what it does is not its to decide.
        """
        _remove(self._under_way)
        self._under_way = []


def _told(path: Path) -> str:
    try:
        mark = json.loads(path.read_bytes())
        return f"{mark['job']}: {mark['reason'] or 'no word'}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path.name} cannot be read"


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
