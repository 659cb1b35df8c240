"""Cells of speed-ups: what each says, where one is missing, and what the colours span."""

import pytest

from hiermoe.analysis.figures.speedup_cells import Line, draw_cells


def test_every_cell_has_its_lines_and_a_missing_one_a_dash() -> None:
    figure = draw_cells(
        "a title",
        {"a": "row a", "b": "row b"},
        {1: "one", 2: "two"},
        {("a", 1): (2.0, ("2.00×", "HD2")), ("a", 2): (0.9, ("0.90×", "HD3")), ("b", 2): (1.1, ("1.10×", "flat"))},
        (Line(-0.2, 15, "bold"), Line(0.2, 11)),
        "speed-up",
    )
    panel, bar = figure.axes
    found = {(text.get_text(), *text.get_position()) for text in panel.texts}
    first = {("2.00×", 0, -0.2), ("HD2", 0, 0.2), ("0.90×", 1, -0.2), ("HD3", 1, 0.2)}
    assert found == first | {("–", 0, 1), ("1.10×", 1, 0.8), ("flat", 1, 1.2)}
    assert {text.get_text(): text.get_fontsize() for text in panel.texts}["HD2"] == 11
    assert bar.get_ylim() == pytest.approx((0.9, 2.0))
    assert [label.get_text() for label in panel.get_yticklabels()] == ["row a", "row b"]
