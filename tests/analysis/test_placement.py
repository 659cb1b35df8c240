"""The placement section: what it computes from records, and what it says."""

import numpy as np
import pandas as pd
import pytest

from hiermoe.analysis.claims import load_claims
from hiermoe.analysis.figures.beyond.policies import FIGURE
from hiermoe.analysis.frames import Results
from tests.analysis.conftest import step_ms


@pytest.fixture(scope="module")
def table(results: Results) -> pd.DataFrame:
    return FIGURE.table(results, load_claims())


def test_every_system_is_compared_with_its_own_dispatch_with_experts_fixed(table: pd.DataFrame) -> None:
    static = table.groupby("system")["static_ms"].mean()
    for system, fixed in {"hiermoe_multi": "hd_moe", "hd2_moe_smart": "hd2_moe", "smartmoe": "megatron"}.items():
        assert static[system] == pytest.approx(step_ms(fixed), rel=0.02)


def test_rows_are_per_token_and_no_row_is_below_its_bound(table: pd.DataFrame) -> None:
    """The made-up records: 64 tokens a GPU, each on 0.9 of the groups that it could touch; 500 rows at the busiest."""
    own = table[(table["system"] == "hiermoe") & (table["model"] == "qwen3_30b_a3b_paper")]
    assert own["node_rows"].to_numpy() == pytest.approx(np.full(len(own), 4 * 0.9))
    assert own["gpu_rows"].to_numpy() == pytest.approx(np.full(len(own), 8 * 0.9))
    assert own["busiest_node_rows"].to_numpy() == pytest.approx(np.full(len(own), 500 / 64))
    assert own["busiest_node_rows_even"].to_numpy() == pytest.approx(np.full(len(own), 231 / 64))  # 230.4 rounded up
    assert set(own["node_rows_any_placement"]) == {1.0}
    assert set(own["gpu_rows_any_placement"]) == {2.0}  # four of 128 experts a GPU


def test_table_and_words_are_those_of_the_records(table: pd.DataFrame) -> None:
    words = FIGURE.words(table)
    header, *rows = words.rows
    assert len({len(row) for row in (header, *rows)}) == 1
    cells = {(model, routing, placement): row for model, routing, placement, *row in rows}
    multi = cells["Qwen3-30B-A3B (paper's, 32 layers)", "recorded", "HierD-ES multi"]
    # Updates and experts of 8 iterations, of 4 held-out ones; gains as modelled and realised; 4 x 1.3 ms.
    assert multi[2:6] == ["8, 32", "4, 16", "0.200, 0.150", "5.20"]
    assert cells["Qwen3-30B-A3B (paper's, 32 layers)", "recorded", "experts fixed"][1:4] == ["1", "0, 0", "0, 0"]
    assert ("DeepSeek-V3 (paper's, half width)", "recorded", "HierD-ES") not in cells
    text = " ".join(words.text)
    assert "In sum the model saw 80% of what a recount of the same tokens finds" in text
    assert "saves 6." in text or "saves 5." in text  # 46 to 40 ms, with noise
    assert "No policy is faster" not in text
    assert "HierD-ES over fixed experts is 1.1" in text and "published 1.157 (Fig. 11)" in text


def test_a_policy_that_gains_nothing_is_said_to_gain_nothing(table: pd.DataFrame) -> None:
    slower = table["static_ms"] * table["system"].map(lambda system: 1.0 if system == "hd_moe" else 1.01)
    still = table.assign(predicted_ms=slower)
    text = " ".join(FIGURE.words(still).text)
    assert text.count("No policy is faster than experts left in order, though a swap promised 0.20 ms") == 2
    assert "saves" not in text
    assert "under the fastest placement (experts fixed)" in text


def test_section_says_that_its_times_are_predicted(table: pd.DataFrame) -> None:
    assert "Predicted times, nothing measured" in FIGURE.words(table).caption


def test_going_back_to_earlier_routing_is_told_only_where_time_rises(table: pd.DataFrame) -> None:
    own = table[(table["system"] == "hiermoe") & (table["routing"] == "recorded")].iloc[:8]
    looped = own.assign(routing_iteration=[4, 5, 6, 7, 4, 5, 6, 7], static_ms=50.0)
    rising, steady = [40.0] * 4 + [41.0] * 4, [40.0] * 8
    others = table.drop(own.index)
    for times_ms, told in ((rising, True), (steady, False)):
        text = " ".join(FIGURE.words(pd.concat([others, looped.assign(predicted_ms=times_ms)])).text)
        assert ("at iteration 4, HierD-ES's time over fixed experts rises by 2.0 percentage points" in text) == told
