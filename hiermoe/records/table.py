"""Records of many runs as one table, for pandas: every column of every row, options included."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from hiermoe.records.checksums import Damaged
from hiermoe.records.choices import or_else
from hiermoe.records.options import KEYS
from hiermoe.records.schema import RECORDS
from hiermoe.records.store import RunStore

# What rows of one run differ in, and what is measured; whatever else a table has is the same in all rows of a run.
_OF_A_RUN = {"source", "system", "model", "cluster", "routing", "seed", "num_experts", "topk", "num_ranks"}
_OF_A_RUN |= {"tokens_per_rank", "row_bytes"}
OF_ROWS = frozenset(RECORDS.columns) - _OF_A_RUN

Wanted = Mapping[str, Any]  # column -> a value, or a sequence of values that will do
_EMPTY = "null"  # of a run that has no such option, or null


def read_records(
    wanted: Wanted | None = None, store: RunStore | None = None, runs: Collection[str] | None = None
) -> pd.DataFrame:
    """Rows of all runs, or of some.

    Args:
        wanted: columns with the value, or the values, that rows must have; texts as on the command line will do too,
            ``null`` for an empty cell.
        store: where records are.
        runs: names of runs; None for all that the store has.

    Returns:
        One row per measurement, with all columns of records and one for every option that some run has; where a run
        has no such option, or it is null, the cell is empty. Damaged records are left out, with a warning.

    Raises:
        ValueError: a column that no record has, or a value that is not of its kind.
    """
    store = store or RunStore()
    wanted = {KEYS.get(name, name): value for name, value in (wanted or {}).items()}
    known: set[str] = set(RECORDS.columns)
    frames = []
    for run in store.run_ids() if runs is None else runs:
        try:
            rows = store.table(run)
        except Damaged as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
            continue
        known.update(rows.schema.names)
        if all(name in rows.schema.names or _EMPTY in _listed(value) for name, value in wanted.items()):
            frames.append(_wanted(rows, wanted))
    for name in wanted:
        if name not in known:
            near = or_else(name, known)  # which else names all there are, some 190
            meant = f"; {near}" if near.startswith("did you mean") else ""
            raise ValueError(f"records have no column {name}{meant} (`hiermoe records --columns` lists them)")
    frames = [frame for frame in frames if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(RECORDS.columns))


def differing(rows: pd.DataFrame) -> list[str]:
    """Columns that say in what the runs of some rows differ, options and sizes; empty for runs of one setting."""
    names = [str(name) for name in rows.columns if name not in OF_ROWS]
    return [name for name in names if len(rows[name].drop_duplicates()) > 1]


def _wanted(rows: pa.Table, wanted: Wanted) -> pd.DataFrame:
    """Rows of one run that are as wanted."""
    for name, value in wanted.items():
        if name not in rows.schema.names:
            continue  # null is wanted, and the run has no such option
        values, kind = _listed(value), rows.schema.field(name).type
        one = pc.field(name).isin(pa.array([_as(kind, item, name) for item in values if item != _EMPTY], kind))
        rows = rows.filter(one | pc.field(name).is_null() if _EMPTY in values else one)
    return rows.to_pandas()


def _listed(value: Any) -> list[Any]:
    """The values that will do; None as it is written."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [_EMPTY if item is None else item for item in values]


def _as(kind: pa.DataType, value: Any, name: str) -> Any:
    """A value in the kind of its column."""
    text = str(value)
    try:
        if pa.types.is_boolean(kind):
            return {"true": True, "false": False}[text.lower()]
        if pa.types.is_floating(kind):
            return float(text)
        if pa.types.is_integer(kind):
            return int(text) if text.lstrip("-").isdigit() else _whole(float(text))
    except (KeyError, ValueError):
        expected = "true or false" if pa.types.is_boolean(kind) else "a number"
        raise ValueError(f"{name}={text}: this column holds {expected}") from None
    return text


def _whole(number: float) -> int | None:
    """None, which no row has, for a number that no whole column can have."""
    return int(number) if number.is_integer() else None
