"""Sweeps once more, layer after layer: on recorded routing of two stages, and on what published models routed."""

from hiermoe.records.index import REAL_MODELS, RECORDED, over
from hiermoe.routing.public import public_trace
from hiermoe.runs.compose import Cell, expand
from hiermoe.runs.run_config import RunConfig

JUDGED = ("fig10", "fig11", "structure")
"""Sweeps whose claims are judged over places. Table II's are not: its numbers are of another E than real models'."""
ROUTINGS = (RECORDED, REAL_MODELS)


def sweeps_over_places() -> dict[str, list[Cell]]:
    """Runs by the name that :func:`over` gives the sweep; none where their routing is not here."""
    cells = {over(sweep, routings): expand(sweep, routings) for routings in ROUTINGS for sweep in JUDGED}
    return {name: [one for one in sweep if _is_here(one.config)] for name, sweep in cells.items()}


def _is_here(config: RunConfig) -> bool:
    name = config.routing.source.get("name")  # of a public set; what is recorded is shipped
    return name is None or public_trace(name).exists()
