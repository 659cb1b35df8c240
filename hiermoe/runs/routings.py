"""Sweeps once more, on other routing than their own: what published models routed, layer after layer."""

from hiermoe.records.index import REAL_MODELS, over
from hiermoe.routing.public import public_trace
from hiermoe.runs.compose import Cell, expand

JUDGED = ("fig10", "fig11", "structure")
"""Sweeps whose claims are judged on real models' routing. Table II's are not: its numbers are of another E."""


def sweeps_on_real_models() -> dict[str, list[Cell]]:
    """Runs by the name that :func:`over` gives the sweep; none where their routing was not fetched."""
    cells = {over(sweep, REAL_MODELS): expand(sweep, REAL_MODELS) for sweep in JUDGED}
    return {name: [one for one in sweep if _is_here(one)] for name, sweep in cells.items()}


def _is_here(cell: Cell) -> bool:
    return public_trace(cell.config.routing.source["name"]).exists()
