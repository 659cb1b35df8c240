"""How many injections there are is what the page on reliability says."""

from hiermoe.records.project import CODE
from tests.faults import (
    test_damaged_checkpoints,
    test_damaged_records,
    test_files_under_a_run,
    test_processes,
    test_signals,
)


def test_the_page_on_reliability_says_how_many_there_are_in_all() -> None:
    damaged = len(test_damaged_records.INJECTIONS) + len(test_damaged_checkpoints.INJECTIONS)
    count = damaged + test_processes.COUNT + test_signals.COUNT + test_files_under_a_run.COUNT
    assert f"In all {count} injections" in (CODE / "docs" / "reliability.md").read_text()
