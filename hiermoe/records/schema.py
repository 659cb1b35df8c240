"""The columns of a record: one row per measurement, its keys, its values with units in their names."""

from functools import cache

import pandas as pd
import pandera.pandas as pa

SOURCES = ("simulated", "local", "emulated", "cluster")
STATUSES = ("ok", "failed", "not_applicable")

# phase "dispatch": one row per stage of the iteration's AlltoAll. Measured runs have one per rank, another with
#                   stage "all" for the whole call, and the same for the three other calls of a training step.
# phase "routing":  one row per level of the hierarchy, what the routing asks for whatever the system.
# phase "start":    measured runs, one row: the moves that iterations before have led to, found without running them.
# phase "step":     one row per iteration, the four AlltoAlls together, and what the placement policy did after it.
# phase "planning": one row per iteration and part of what a rank's placement policy does (stage measure, decide).
# phase "train":    one row per training step and rank.
# phase "calibration": one row per AlltoAll, size and repeat (iteration).
# phase "run":      one row, for a run that failed or does not apply.
CALLS = ("dispatch", "combine", "combine_backward", "dispatch_backward")
PHASES = (*CALLS, "routing", "start", "step", "planning", "train", "calibration", "run")
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
        "row_bytes": pa.Column(int),  # M * v, after what the run has narrowed it to; 0 where no rows move
        "iteration": pa.Column(int),  # of the run; -1 in phases "run" and "start"
        "routing_iteration": pa.Column(int),  # of the routing source
        "counted": pa.Column(bool),  # counts for results: at most the last half, tokens that no decision has seen
        "layer": pa.Column(int),
        "rank": pa.Column(int),  # that measured; -1: all ranks together
        "phase": pa.Column(str, pa.Check.isin(PHASES)),
        "stage": pa.Column(str),  # "1:inter1"; phase "routing": the level's name; else "all"
        "dimension": _number(low=1),  # d of the scheme used
        "predicted_ms": _number(),  # phase dispatch: the stage in one AlltoAll; phase step: the four AlltoAlls
        "link_ms": _number(),  # dispatch: least time of the stage on the busiest link of a shaped level
        "rows": _number(),  # dispatch: at the busiest GPU; routing: distinct (token, group) pairs
        "group_rows": _number(),  # dispatch, deduplicated: of the busiest group, per GPU of it: what Q counts
        "bytes": _number(),  # rows * M * v; planning: what ranks sum
        "crossing_rows": _number(),  # dispatch: rows that leave their GPU, all GPUs together
        "pairs": _number(),  # token-expert pairs of the step
        "dropped_pairs": _number(),
        "expert_rows_max": _number(),  # token-expert pairs at the busiest GPU: compute balance
        "expert_rows_mean": _number(),
        "moved_experts": _number(),  # after this iteration
        "moves": pa.Column(str),  # of them: "17>40 40>17", logical expert > its new slot; train: "layer 2: 17>40; ..."
        "migration_bytes": _number(),  # full state: weights, fp32 masters, Adam moments; measured: what the rank sent
        "migration_link_ms": _number(),  # of them, at the link's rate
        "migration_alltoall_ms": _number(),  # of them, at the rate that the AlltoAll reaches
        "modelled_gain_ms": _number(low=None),  # what the policy expected to save per step
        "recounted_gain_ms": _number(low=None),  # several swaps at once: what a recount of the same tokens finds
        "realised_gain_ms": _number(low=None),  # exact traffic of the next step, at the old placement less at the new
        "dispatch_ms": _number(),  # measured: the whole call
        "wire_ms": _number(),  # of it, in collectives: count exchange and metadata included
        "alone_ms": _number(),  # dispatch stages: their rows sent once more, all ranks ready before
        "local_ms": _number(),  # of it, everything else
        "metadata_bytes": _number(),  # which experts and which weights, sent beside the rows
        "num_wrong": _number(),  # elements of the result that differ from the known answer
        "peak_memory_bytes": _number(),  # of the process (CPU) or its allocations (CUDA) during the iteration
        "loss": _number(low=None),
        "train_step_ms": _number(),  # measured: forward, backward and optimizer
        "alltoall_forward_ms": _number(),  # of it, in dispatch and combine
        "alltoall_backward_ms": _number(),
        "planning_ms": _number(),  # measured, beside the step: what the placement policy measured, summed and decided;
        # phase planning: one of its parts alone
        "migration_ms": _number(),  # measured, after the step: moving experts
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
