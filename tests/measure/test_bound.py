"""Bounds as records, beside what placements reach."""

import pytest

from hiermoe.measure.bound import bound_times
from hiermoe.measure.predict import simulate
from hiermoe.measure.workload import open_workload
from tests.conftest import Command, Composer


@pytest.mark.parametrize("system", ["hd_moe", "hiermoe"])
def test_every_counted_step_of_every_policy_takes_longer(composed: Composer, system: str) -> None:
    workload = open_workload(composed(f"system={system}", "tokens_per_rank=256"))
    bound, found = (rows[rows["counted"]] for rows in (bound_times(workload), simulate(workload)))
    keys = ["iteration", "routing_iteration", "phase", "stage"]
    both = bound.merge(found, on=keys, suffixes=("_least", ""))
    assert len(both) == len(bound) == 2 * 5  # two steps of four levels and a time
    steps, levels = both[both["phase"] == "step"], both[both["phase"] == "routing"]
    assert (steps["predicted_ms_least"] < steps["predicted_ms"]).all()
    assert (levels["rows_least"] < levels["rows"]).all() and (levels["pairs_least"] == levels["pairs"]).all()


def test_a_run_of_bounds_is_stored_and_shown(hiermoe: Command) -> None:
    code, output, errors = hiermoe(
        "run", "measure=bound", "system=hd_moe", "routing=uniform", "tokens_per_rank=32", "iterations=2",
        "wandb.mode=disabled",
    )  # fmt: skip
    assert code == 0, errors
    assert "the four AlltoAlls of a step and layer" in output and "nan" not in output
