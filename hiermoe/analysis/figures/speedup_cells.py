"""Cells of speed-ups by two things, blue where something gains and red where it loses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from hiermoe.analysis.figures import style


@dataclass(frozen=True)
class Line:
    """A line of every cell.

    Attributes:
        height: of its middle below the cell's, in cells.
        size: of its letters, in points.
        weight: of its letters.
    """

    height: float
    size: float
    weight: str = "normal"


def draw_cells(
    title: str,
    rows: Mapping[object, str],
    columns: Mapping[object, str],
    cells: Mapping[tuple[object, object], tuple[float, Sequence[str]]],
    lines: Sequence[Line],
    meaning: str,
) -> Figure:
    """Draw them, and a dash where there is none.

    Args:
        title: a sentence.
        rows: what each is called, in their order.
        columns: likewise.
        cells: by row and column: the speed-up, and its text in as many lines as `lines` has.
        lines: how each line of a cell looks.
        meaning: of the speed-up.
    """
    values = np.array([[cells.get((row, column), (np.nan, ()))[0] for column in columns] for row in rows])
    top = max(float(np.nanmax(values)), 1.01)
    figure, (panel,) = style.grid(title, 1, 1, (12, 1.7 + 0.95 * len(rows)))
    image = panel.imshow(values, cmap="RdBu", norm=TwoSlopeNorm(1.0, 2 - top, top), aspect="auto")
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if (row, column) not in cells:
                panel.text(x, y, "–", ha="center", va="center")
                continue
            value, text = cells[row, column]
            color = "white" if value - 1 > 0.62 * (top - 1) else style.INK
            for line, look in zip(text, lines, strict=True):
                panel.text(
                    x, y + look.height, line, ha="center", va="center", color=color, size=look.size, weight=look.weight
                )  # fmt: skip
    panel.set_xticks(range(len(columns)), list(columns.values()))
    panel.set_yticks(range(len(rows)), list(rows.values()))
    panel.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    panel.grid(visible=False)
    panel.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=panel, fraction=0.025, pad=0.01)
    bar.ax.set_ylim(min(1.0, float(np.nanmin(values))), top)
    bar.set_label(meaning)
    bar.outline.set_visible(False)  # type: ignore[operator] - a patch
    return figure
