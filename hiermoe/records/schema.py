"""The columns of a record: one row per measurement, its keys, its values with units in their names."""

from functools import cache

import pandas as pd
import pandera.pandas as pa

SOURCES = ("simulated", "local", "emulated", "cluster")
STATUSES = ("ok", "failed", "not_applicable")

# What columns and phases mean: meanings.py.
CALLS = ("dispatch", "combine", "combine_backward", "dispatch_backward")
COPIES = ("copies", "gradients")
PHASES = (*CALLS, *COPIES, "routing", "start", "step", "planning", "train", "calibration", "run")
DEFAULTS = {"rank": -1, "row_bytes": 0, "moves": "", "status": "ok", "reason": ""}


def _number(nullable: bool = True, low: float | None = 0.0) -> pa.Column:
    return pa.Column(float, [] if low is None else pa.Check.ge(low), nullable=nullable, coerce=True)


RECORDS = pa.DataFrameSchema(
    {
        "run_id": pa.Column(str),
        "source": pa.Column(str, pa.Check.isin(SOURCES)),
        "system": pa.Column(str),
        "model": pa.Column(str),
        "cluster": pa.Column(str),
        "routing": pa.Column(str),
        "seed": pa.Column(int),
        "num_experts": pa.Column(int),
        "topk": pa.Column(int),
        "num_ranks": pa.Column(int),
        "tokens_per_rank": pa.Column(int),
        "row_bytes": pa.Column(int),
        "iteration": pa.Column(int),
        "routing_iteration": pa.Column(int),
        "counted": pa.Column(bool),
        "layer": pa.Column(int),
        "rank": pa.Column(int),
        "phase": pa.Column(str, pa.Check.isin(PHASES)),
        "stage": pa.Column(str),
        "dimension": _number(low=1),
        "chunks": _number(low=1),
        "predicted_ms": _number(),
        "link_ms": _number(),
        "rows": _number(),
        "group_rows": _number(),
        "bytes": _number(),
        "crossing_rows": _number(),
        "pairs": _number(),
        "dropped_pairs": _number(),
        "expert_rows_max": _number(),
        "expert_rows_mean": _number(),
        "moved_experts": _number(),
        "moves": pa.Column(str),
        "migration_bytes": _number(),
        "migration_link_ms": _number(),
        "migration_alltoall_ms": _number(),
        "copies_bytes": _number(),
        "copies_link_ms": _number(),
        "copies_alltoall_ms": _number(),
        "gradient_bytes": _number(),
        "gradient_link_ms": _number(),
        "gradient_alltoall_ms": _number(),
        "slots_gb": _number(),
        "net_ms": _number(),
        "modelled_gain_ms": _number(low=None),
        "recounted_gain_ms": _number(low=None),
        "realised_gain_ms": _number(low=None),
        "dispatch_ms": _number(),
        "wire_ms": _number(),
        "alone_ms": _number(),
        "local_ms": _number(),
        "metadata_bytes": _number(),
        "num_wrong": _number(),
        "peak_memory_bytes": _number(),
        "loss": _number(low=None),
        "train_step_ms": _number(),
        "alltoall_forward_ms": _number(),
        "alltoall_backward_ms": _number(),
        "planning_ms": _number(),
        "migration_ms": _number(),
        "copies_ms": _number(),
        "gradient_ms": _number(),
        "landing_ms": _number(),
        "hidden_ms": _number(),
        "status": pa.Column(str, pa.Check.isin(STATUSES)),
        "reason": pa.Column(str),
    },
    strict=True,
    ordered=True,
)


@cache
def _schema_of(given: frozenset[str]) -> pa.DataFrameSchema:
    """Rules of the columns that somebody gives, and of those that nobody may leave out: each takes milliseconds."""
    needed = {name for name, column in RECORDS.columns.items() if not column.nullable and name not in DEFAULTS}
    return RECORDS.select_columns([name for name in RECORDS.columns if name in given | needed])


def validate(rows: pd.DataFrame) -> pd.DataFrame:
    """Check everything, complete missing value columns with NaN, and order columns.

    Raises:
        ValueError: an unknown column.
        pandera.errors.SchemaError: a column is missing or a value breaks a rule.
    """
    unknown = [name for name in rows.columns if name not in RECORDS.columns]
    if unknown:
        raise ValueError(f"records have no column {unknown[0]!r}")
    given = rows[[name for name in RECORDS.columns if name in rows]]
    if "moves" in given:
        given = given.assign(moves=given["moves"].fillna(""))
    checked = _schema_of(frozenset(given)).validate(given)
    missing = {name: DEFAULTS.get(name, float("nan")) for name in RECORDS.columns if name not in checked}
    return checked.assign(**missing)[list(RECORDS.columns)]
