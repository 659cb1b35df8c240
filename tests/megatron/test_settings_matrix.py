"""The table of settings in docs/training.md says what the tests say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hiermoe.records.project import CODE
from tests.megatron import settings_matrix as matrix


@pytest.mark.slow
def test_every_row_is_shown_by_tests_that_are_there() -> None:
    called = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/megatron"]
    listed = subprocess.run(called, cwd=CODE, capture_output=True, text=True, timeout=300, check=True).stdout
    names = re.findall(r"^tests/megatron/(test_\w+)\.py(::.+)$", listed, re.MULTILINE)
    (pinned,) = re.findall(r"megatron-core==(.+)", (CODE / "constraints.txt").read_text())
    said = matrix.column_shown(pinned)  # of the version that all tests run with, and must pass with
    for row, pattern in matrix.SETTINGS.items():
        if "test_pretrain" in pattern:  # megatron.training comes with 0.19
            assert said[row] == matrix.UNTESTED
            continue
        assert matrix.tests_of(row, ["".join(name) for name in names]), row
        assert said[row] == (matrix.REFUSED if matrix.is_refusal(pattern) else matrix.PASSES), row


def test_cells_are_what_a_report_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "SETTINGS", {"good": "good.*", "bad": "bad.*", "skipped": "skip.*", "gone": "gone.*"})
    cases = {"good[a]": "", "good[b]": "", "bad": "<failure/>", "bad_too": "", "skip": "<skipped/>"}
    body = "".join(f'<testcase classname="t.x" name="{name}">{inner}</testcase>' for name, inner in cases.items())
    (tmp_path / "a.xml").write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")
    said = matrix.cells(tmp_path / "a.xml")
    assert list(said.values()) == [matrix.PASSES, matrix.FAILS, matrix.UNTESTED, matrix.UNTESTED]
