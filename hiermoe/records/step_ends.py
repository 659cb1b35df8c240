"""What whole training steps take, and what planning and moving experts add to them."""

import pandas as pd


def step_ends(rows: pd.DataFrame) -> pd.DataFrame:
    """By iteration the last rank's end, and by how much later that is than without planning, and without moving.

    A rank that waits in planning for one whose step took longer waits in no step of its own.

    Args:
        rows: of training steps, one a rank and iteration, which ranks begin together; with `train_step_ms`,
            `planning_ms` and `migration_ms`.

    Returns:
        train_step_ms, planning_ms, migration_ms, and step_ms, their sum.
    """
    planned_ms = rows["train_step_ms"] + rows["planning_ms"]
    ends = rows.assign(planned_ms=planned_ms, step_ms=planned_ms + rows["migration_ms"])
    last = ends.groupby("iteration")[["train_step_ms", "planned_ms", "step_ms"]].max()
    return pd.DataFrame(
        {
            "train_step_ms": last["train_step_ms"],
            "planning_ms": last["planned_ms"] - last["train_step_ms"],
            "migration_ms": last["step_ms"] - last["planned_ms"],
            "step_ms": last["step_ms"],
        }
    )
