"""The results store: one folder a run, complete once the checksums of its files are in it."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import yaml
from pyarrow.parquet import ParquetFile

from hiermoe.records.checksums import LIST, Damaged, checksum_list, read_list, whole_content
from hiermoe.records.options import option_columns
from hiermoe.records.project import RUNS
from hiermoe.records.schema import RECORDS, validate
from hiermoe.records.status import Status
from hiermoe.records.whole_file import write_all_whole

CONFIG, PROVENANCE, ROWS = "config.yaml", "provenance.json", "records.parquet"
_FILES = (CONFIG, PROVENANCE, ROWS)


class RunStore:
    """Runs below one folder: ``<run_id>/{config.yaml, provenance.json, records.parquet, checksums.sha256}``.

    Files are written whole or not at all, and are believed only if they are what was written: every method that reads
    them compares checksums, which name the run too.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Use the store at ``folder``, results/runs by default; it need not exist yet."""
        self.folder = folder or RUNS

    def path(self, run_id: str) -> Path:
        """Folder of a run."""
        return self.folder / run_id

    def run_ids(self) -> list[str]:
        """Names of all runs that have a record, in alphabetical order."""
        return sorted(path.parent.name for path in self.folder.glob(f"*/{ROWS}"))

    def damaged(self, run_ids: Iterable[str] | None = None) -> dict[str, str]:
        """Runs whose records cannot be believed, and why.

        Args:
            run_ids: those to look at; None for all that have a record.
        """
        found = {}
        for run_id in self.run_ids() if run_ids is None else run_ids:
            try:
                self.ended(run_id)
            except Damaged as error:
                found[run_id] = error.why
        return found

    def ended(self, run_id: str) -> tuple[Status, str] | None:
        """How a run ended: status and reason; None where there is no record.

        Raises:
            Damaged: the record is not what was written.
        """
        if not self.has(run_id):
            return None
        # A tenth of the time that reading the record takes.
        with self._rows(run_id) as rows:
            first = rows.read_row_group(0, columns=["status", "reason"], use_threads=False).slice(0, 1)
        return first["status"][0].as_py(), first["reason"][0].as_py()

    def has(self, run_id: str) -> bool:
        """Whether there is a record of the run, however it ended; nothing is read."""
        return (self.path(run_id) / ROWS).exists()

    def written(self, run_id: str) -> list[tuple[int, int]] | None:
        """When the files of the record were written, in ns since 1970, and their sizes; None where there is none."""
        if not self.has(run_id):
            return None
        stats = [path.stat() for name in (*_FILES, LIST) if (path := self.path(run_id) / name).exists()]
        return [(stat.st_mtime_ns, stat.st_size) for stat in stats]

    def is_done(self, run_id: str) -> bool:
        """Whether the run need not be run again. A failed run has a record, and is tried again, as is a damaged one."""
        try:
            ended = self.ended(run_id)
        except Damaged:
            return False
        return ended is not None and ended[0] != "failed"

    def write(
        self, run_id: str, config: dict[str, Any], provenance: dict[str, Any], records: pd.DataFrame
    ) -> pd.DataFrame:
        """Check and store a run. Its file has a column for each of its options too.

        Returns:
            The records as :meth:`read` gives them.

        Raises:
            ValueError: a column contradicts the option that it has the value of.
            OSError: the disk is full or not writable; an earlier record of the run is left as it was.
        """
        frame = validate(records)
        contents = {
            CONFIG: yaml.dump(config, Dumper=yaml.CSafeDumper, sort_keys=False).encode(),
            PROVENANCE: json.dumps(provenance, indent=1).encode(),
            ROWS: with_options(frame, config).to_parquet(index=False),
        }
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            write_all_whole(self.path(run_id), {**contents, LIST: checksum_list(f"run {run_id}", digests)})
        return frame

    def forget(self, run_id: str) -> None:
        """Have a run no record any more: its rows get another name, for whoever wants to know what happened to them."""
        path = self.path(run_id) / ROWS
        path.replace(path.with_suffix(".damaged"))

    def read(self, run_id: str) -> pd.DataFrame:
        """Records of a run, without its options.

        Raises:
            FileNotFoundError: the run has no record.
            Damaged: it is not what was written.
        """
        with self._rows(run_id) as rows:
            return rows.read(columns=list(RECORDS.columns)).to_pandas()

    def table(self, run_id: str) -> pa.Table:
        """The same with all columns, options included."""
        with self._rows(run_id) as rows:
            return rows.read()

    def config(self, run_id: str) -> dict[str, Any]:
        """The configuration of a run that has a record, as :meth:`read` raises."""
        return yaml.load(self._contents(run_id)[CONFIG], Loader=yaml.CSafeLoader)

    def provenance(self, run_id: str) -> dict[str, Any]:
        """What made the record of a run, as :meth:`read` raises."""
        return json.loads(self._contents(run_id)[PROVENANCE])

    def command(self, run_id: str) -> str | None:
        """What made a record, as its provenance says, even of a damaged one; None where that is not to be read."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads((self.path(run_id) / PROVENANCE).read_bytes())["command"])
        return None

    @contextmanager
    def _rows(self, run_id: str) -> Iterator[ParquetFile]:
        """The file of rows, which has some, and all columns of records."""
        folder, content = self.path(run_id), self._contents(run_id)[ROWS]
        try:
            file = ParquetFile(BytesIO(content))
        except pa.ArrowException as error:
            raise Damaged(folder, f"{ROWS} is no table: {str(error).splitlines()[0]}") from error
        with file:
            present = set(file.schema_arrow.names)
            lacking = [name for name in RECORDS.columns if name not in present]
            if lacking:
                raise Damaged(folder, f"is of another schema: {ROWS} has no column {lacking[0]}")
            if not file.metadata.num_rows:
                raise Damaged(folder, f"{ROWS} has no rows")
            yield file

    def _contents(self, run_id: str) -> dict[str, bytes]:
        """All files of a record, compared with their checksums."""
        folder = self.path(run_id)
        if not self.has(run_id):
            raise FileNotFoundError(f"{folder} has no record")
        try:
            return _compared(folder, run_id)
        except Damaged:
            with self._alone():  # another process may have been writing it anew
                return _compared(folder, run_id)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from giving files of this store their names meanwhile."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            # Some file systems of clusters have no locks. Two processes that write one run at once may spoil its record
            # there, which its checksums tell.
            with suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def _compared(folder: Path, run_id: str) -> dict[str, bytes]:
    digests = read_list(folder, f"run {run_id}", _FILES)
    return {name: whole_content(folder, name, digests[name]) for name in _FILES}


def with_options(rows: pd.DataFrame, config: dict[str, Any]) -> pd.DataFrame:
    """Rows of a run with a column for each of its options.

    Raises:
        ValueError: a column contradicts the option that it has the value of.
    """
    columns = option_columns(config)
    for name in [name for name in columns if name in rows]:
        value = columns.pop(name)
        if (rows[name] != value).any():
            raise ValueError(f"{name}={rows[name].iloc[0]} in a record whose run has {name}={value}")
    return pd.concat([rows, pd.DataFrame(columns, index=rows.index)], axis=1)
