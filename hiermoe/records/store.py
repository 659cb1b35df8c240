"""The results store: one folder a run, complete once its records are in it."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pyarrow.parquet import ParquetFile

from hiermoe.records.options import option_columns
from hiermoe.records.project import RUNS
from hiermoe.records.schema import RECORDS, validate
from hiermoe.records.status import Status
from hiermoe.records.whole_file import write_whole


class RunStore:
    """Runs below one folder: ``<run_id>/{config.yaml, provenance.json, records.parquet}``.

    Files are written whole or not at all; records come last and make the run complete.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Use the store at ``folder``, results/runs by default; it need not exist yet."""
        self.folder = folder or RUNS

    def path(self, run_id: str) -> Path:
        """Folder of a run."""
        return self.folder / run_id

    def run_ids(self) -> list[str]:
        """Names of all complete runs, in alphabetical order."""
        return sorted(path.parent.name for path in self.folder.glob("*/records.parquet"))

    def ended(self, run_id: str) -> tuple[Status, str] | None:
        """How a complete run ended: status and reason; None where there is no record."""
        records = self.path(run_id) / "records.parquet"
        if not records.exists():
            return None
        # A tenth of the time that reading the record takes.
        first = ParquetFile(records).read_row_group(0, columns=["status", "reason"], use_threads=False).slice(0, 1)
        return first["status"][0].as_py(), first["reason"][0].as_py()

    def has(self, run_id: str) -> bool:
        """Whether there is a record of the run, however it ended."""
        return self.written_ns(run_id) is not None

    def written_ns(self, run_id: str) -> int | None:
        """When the record of the run was written, in ns since 1970; None where there is none."""
        records = self.path(run_id) / "records.parquet"
        return records.stat().st_mtime_ns if records.exists() else None

    def is_done(self, run_id: str) -> bool:
        """Whether the run need not be run again. A failed run has a record, and is tried again."""
        ended = self.ended(run_id)
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
        stored = with_options(frame, config)
        folder = self.path(run_id)
        write_whole(folder / "config.yaml", yaml.dump(config, Dumper=yaml.CSafeDumper, sort_keys=False).encode())
        write_whole(folder / "provenance.json", json.dumps(provenance, indent=1).encode())
        write_whole(folder / "records.parquet", stored.to_parquet(index=False))
        return frame

    def read(self, run_id: str) -> pd.DataFrame:
        """Records of a run, without its options.

        Raises:
            FileNotFoundError: the run has no record.
        """
        return pd.read_parquet(self.path(run_id) / "records.parquet", columns=list(RECORDS.columns))

    def provenance(self, run_id: str) -> dict[str, Any]:
        """What made the record of a run.

        Raises:
            FileNotFoundError: the run has no record.
        """
        return json.loads((self.path(run_id) / "provenance.json").read_bytes())


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
