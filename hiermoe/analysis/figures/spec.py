"""What a figure is: a table of what is plotted, a drawing of that table, and words about it."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures.style import SETTINGS
from hiermoe.analysis.frames import Results
from hiermoe.records.groups import files_of
from hiermoe.records.run_id import code_digest
from hiermoe.records.whole_file import whole, write_whole

DPI = 150
DRAWN = "Drawn from"  # in the metadata of a picture: the digest of what it was drawn from
LOOKS = ("system", "model", "cluster")  # groups of conf/ that name labels and colours
REPRODUCIBLE = {"CreationDate": None, "ModDate": None}  # the same table gives the same file


@dataclass(frozen=True)
class Words:
    """What is said about a figure, all of it from its table.

    Attributes:
        title: what is seen, as a sentence.
        caption: what is plotted, n, and what intervals are.
        text: sentences on what differs and why.
        rows: a table below the figure, its header first; empty where there is none.
    """

    title: str
    caption: str
    text: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class FigureSpec:
    """One figure of the report.

    Attributes:
        name: of its files.
        heading: of its section.
        sweep: whose runs it shows.
        table: what is plotted; empty where there are no records.
        draw: the drawing of a table that is not empty, under a title.
        words: about a table that is not empty.
        sources: kinds of numbers that it is drawn of, each in a figure of its own, and what makes them.
    """

    name: str
    heading: str
    sweep: str
    table: Callable[[Results, Sequence[Claim]], pd.DataFrame]
    draw: Callable[[pd.DataFrame, str], Figure]
    words: Callable[[pd.DataFrame], Words]
    sources: Mapping[str, str] = field(default_factory=lambda: {"simulated": "`hiermoe reproduce` simulates it"})


def render(spec: FigureSpec, table: pd.DataFrame, folder: Path, name: str) -> Words | None:
    """Write ``<name>.png``, ``.pdf`` and ``.csv``, unless the same was drawn before.

    Args:
        spec: the figure.
        table: what its ``table`` returned.
        folder: where to.
        name: of the files.

    Returns:
        The words about it; None where there was nothing to draw, and no file then.
    """
    stem = folder / name
    if table.empty:
        for suffix in (".png", ".pdf", ".csv"):
            stem.with_suffix(suffix).unlink(missing_ok=True)
        return None
    words, data = spec.words(table), table.to_csv(index=False)
    drawn = _digest(spec, words.title, data)
    if not _is_drawn(stem, drawn):
        with mpl.rc_context(SETTINGS):
            figure = spec.draw(table, words.title)
            with whole(stem.with_suffix(".png")) as path:
                figure.savefig(path, dpi=DPI, metadata={DRAWN: drawn})
            figure.set_layout_engine("none")  # the layout is found; finding it again takes as long as drawing
            with whole(stem.with_suffix(".pdf")) as path:
                figure.savefig(path, metadata=REPRODUCIBLE)
        write_whole(stem.with_suffix(".csv"), data.encode())
    return words


def _digest(spec: FigureSpec, title: str, data: str) -> str:
    """Of everything that a figure depends on: its table, the code that draws it, and what conf/ says of looks."""
    looks = [path.read_text() for group in LOOKS for path in files_of(group).values()]
    parts = [title, data, code_digest((spec.draw.__module__,)), mpl.__version__, *looks]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _is_drawn(stem: Path, digest: str) -> bool:
    try:
        with Image.open(stem.with_suffix(".png")) as image:
            same = image.info.get(DRAWN) == digest
    except OSError:
        return False
    return same and all(stem.with_suffix(suffix).exists() for suffix in (".pdf", ".csv"))
