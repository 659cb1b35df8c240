"""Small pieces that the sentences about figures are made of."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from hiermoe.analysis.figures import style

ROUTING_WORDS = {"recorded": "recorded", "uniform": "uniform", "group_limited": "group-limited"}


def headline(table: pd.DataFrame) -> str:
    """The routing that titles speak of: recorded where there is any, else uniform."""
    present = set(table["routing"])
    return next(routing for routing in ("recorded", "uniform", "group_limited", "none") if routing in present)


def per_model(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each model's name for readers, and its rows on the routing that is spoken of."""
    for model, rows in table.groupby("model", sort=False):
        yield style.model(str(model)), rows[rows["routing"] == headline(rows)]


def saves(saved_ms: float) -> str:
    """``saves 1.20 ms`` or ``loses 0.30 ms``."""
    return f"{'saves' if saved_ms >= 0 else 'loses'} {abs(saved_ms):.2f} ms"


def span(values: pd.Series | list[float], digits: int = 2) -> str:
    """Smallest to largest of some values: ``1.62`` or ``1.62–1.94``."""
    low, high = (f"{x:.{digits}f}" for x in (np.min(values), np.max(values)))
    return low if low == high else f"{low}–{high}"


def per_routing(table: pd.DataFrame, column: str = "value", digits: int = 2) -> str:
    """``1.93 (recorded), 1.62 (uniform)``."""
    parts = [
        f"{span(table.loc[table['routing'] == routing, column], digits)} ({name})"
        for routing, name in ROUTING_WORDS.items()
        if (table["routing"] == routing).any()
    ]
    return ", ".join(parts)


def counted(table: pd.DataFrame) -> str:
    """n and what an interval is, for captions."""
    return (
        f"n = {span(table['n'], 0)} measured iterations of one run; bars: 95 % interval over iterations (block "
        "bootstrap, paired where systems are compared; often narrower than the mark). Simulated times."
    )


def capital(text: str) -> str:
    """First letter as a capital, the others as they are."""
    return text[:1].upper() + text[1:]
