"""Progress says what runs, what is left and where the last whole report is, on a terminal and in a log."""

import io

import pytest
from rich.console import Console

from hiermoe.commands import progress_line
from hiermoe.commands.progress_line import ProgressLine


def said(seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines of a log of 100 steps, each of which takes so long."""
    now = [0.0]
    monkeypatch.setattr(progress_line.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with ProgressLine(Console(file=file, width=200), "simulating", 100, "report", "/there/report.html") as progress:
        for _ in range(100):
            now[0] += seconds
            progress.now("fig11")
            progress.advance()
    return file.getvalue().splitlines()


def test_a_log_has_a_line_at_most_every_thirty_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(1.0, monkeypatch)
    assert len(lines) == 2 + 100 // 30
    assert all("then report" in line and "/there/report.html" in line for line in lines[:-1])
    assert "simulating fig11: " in lines[1] and "of 100, about" in lines[1] and "s left" in lines[1]
    assert lines[-1] == "simulating: 100 of 100 done in 100 s"


def test_what_is_quick_says_two_lines_and_nothing_moves_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(0.001, monkeypatch)
    assert len(lines) == 2 and not any("\x1b" in line or "━" in line for line in lines)


def test_a_terminal_has_a_bar() -> None:
    file = io.StringIO()
    console = Console(file=file, width=100, force_terminal=True)
    with ProgressLine(console, "measuring", 2, "report", "none yet") as progress:
        progress.now("qwen3, uniform")
        progress.advance()
    assert "last whole report: none yet" in file.getvalue() and "━" in file.getvalue()
