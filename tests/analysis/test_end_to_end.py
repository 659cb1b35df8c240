"""From AlltoAll to a whole step, by hand."""

import pandas as pd
import pytest

from hiermoe.analysis.whole_step import migration_prices, migration_share, share_needed, step_speedup


def test_share_needed_is_the_share_at_which_both_speedups_agree() -> None:
    assert share_needed(1.25, 2.0) == pytest.approx(0.4)
    for end_to_end, alltoall in ((1.18, 1.99), (1.27, 2.72)):
        assert step_speedup(share_needed(end_to_end, alltoall), 1 / alltoall) == pytest.approx(end_to_end)


def test_all_communication_gives_the_alltoall_ratio_and_none_gives_one() -> None:
    assert step_speedup(1.0, 0.5) == 2.0
    assert step_speedup(0.0, 0.5) == 1.0


def test_migration_slows_the_step() -> None:
    assert step_speedup(0.5, 0.5 + 0.1) < step_speedup(0.5, 0.5)


def test_weights_are_a_seventh_of_the_state() -> None:
    steps = pd.DataFrame({"migration_link_ms": [14.0, 0.0], "migration_alltoall_ms": [28.0, 0.0]})
    priced = {price.label: price.of(steps).tolist() for price in migration_prices()}
    assert priced == {
        "weights, link rate": pytest.approx([2.0, 0.0]),
        "weights, AlltoAll rate": pytest.approx([4.0, 0.0]),
        "full state, link rate": [14.0, 0.0],
        "full state, AlltoAll rate": [28.0, 0.0],
    }


def test_share_of_migration_counts_compute_alltoall_and_itself() -> None:
    megatron = pd.DataFrame({"step_ms": [60.0]})
    system = pd.DataFrame({"step_ms": [30.0], "migration_link_ms": [10.0], "migration_alltoall_ms": [10.0]})
    full = next(price for price in migration_prices() if price.label == "full state, link rate")
    # At a share of 60 %, compute takes 40 ms: 10 of 40 + 30 + 10 is migration.
    assert migration_share(system, megatron, full, 0.6) == pytest.approx(10 / 80)
