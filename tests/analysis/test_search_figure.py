"""The section on searched placements: what it computes from records, and what it says."""

import pandas as pd
import pytest
from matplotlib.figure import Figure

from hiermoe.analysis.claims import load_claims
from hiermoe.analysis.figures.beyond.searched import FIGURE
from hiermoe.analysis.frames import Results
from tests.analysis.conftest import ITERATIONS, step_ms

HELD_OUT = ITERATIONS // 2


@pytest.fixture(scope="module")
def table(results: Results) -> pd.DataFrame:
    return FIGURE.table(results, load_claims())


def two_lengths(table: pd.DataFrame) -> pd.DataFrame:
    """As the sweep has them; the made-up records are all of one length."""
    return pd.concat([table, table.assign(iterations_before=100, updates_before=table["updates_before"] * 10)])


def test_only_held_out_steps_count_and_each_has_its_baseline_and_bound(table: pd.DataFrame) -> None:
    assert set(table["model"]) == {"qwen3_30b_a3b_paper"}  # the made-up store has no recorded DeepSeek-V3
    own = table[table["system"] == "hiermoe"].drop_duplicates("iteration")
    assert own["iteration"].tolist() == list(range(HELD_OUT, ITERATIONS))
    assert own["static_ms"].mean() == pytest.approx(step_ms("hd_moe"), rel=0.02)
    assert own["bound_ms"].mean() == pytest.approx(step_ms("hd_moe") / 2, rel=0.02)
    assert set(own["updates_before"]) == {HELD_OUT} and set(own["moved_before"]) == {2.0 * HELD_OUT}
    assert own["migration_before_ms"].to_numpy() == pytest.approx([2 * 1.3 * HELD_OUT] * HELD_OUT)


def test_words_and_table_are_those_of_the_records(table: pd.DataFrame) -> None:
    words = FIGURE.words(two_lengths(table))
    text = " ".join(words.text)
    header, *rows = words.rows
    assert len({len(row) for row in (header, *rows)}) == 1
    assert "One searched migration makes held-out AlltoAll 1.1" in words.title and "after 40 swaps" in words.title
    assert "after 4 updates and 1.1" in text and "after 40 updates" in text
    # 2 experts in each of 4 iterations for 1.3 ms each, against about 6 ms a step.
    assert "The search moves 8 experts once, 10 ms of full state at the link's rate, which 2 steps pay back" in text
    assert "goes on moving 2.0 experts a step for 2.60 ms and saves" in text
    assert "No placement gets below 23." in text and "at most 1.7" in text
    assert "no gain" not in text and "Predicted times, nothing measured" in words.caption
    fixed = next(row for row in rows if row[1] == "experts fixed")
    assert fixed[3:6] == ("0", "0", "0") and fixed[7] == "1"


def test_a_search_that_gains_nothing_is_said_to_gain_nothing(table: pd.DataFrame) -> None:
    slower = table.assign(predicted_ms=table["static_ms"] * 1.01, router_groups=8)
    text = " ".join(FIGURE.words(two_lengths(slower)).text)
    assert "no gain that these steps can tell from none" in text
    assert "few of 8 groups of neighbours" in text
    assert "pay back" not in text and "saves" not in text


def test_figure_has_a_bar_for_every_policy_and_the_bound(table: pd.DataFrame) -> None:
    figure = FIGURE.draw(two_lengths(table), "title")
    assert isinstance(figure, Figure)
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert labels == [
        "experts fixed", "SmartMoE placement", "HierD-ES after 4", "HierD-ES after 40", "search, once",
        "search, online", "no placement beats",
    ]  # fmt: skip


def test_without_the_bound_or_the_search_there_is_no_figure(results: Results) -> None:
    for lacking in ("search", "search_bound"):
        without = Results({**results.runs, lacking: []}, results.records, results.store)
        assert FIGURE.table(without, load_claims()).empty
