"""Sweeps once more, layer after layer: on recorded routing of two stages, and on what published models routed."""

import pandas as pd

from hiermoe.records.index import REAL_MODELS, RECORDED, over
from hiermoe.records.project import PUBLISHED
from hiermoe.routing.public import public_trace
from hiermoe.runs.compose import Cell, expand
from hiermoe.runs.run_config import RunConfig

JUDGED = ("fig10", "fig11")
"""Sweeps whose claims are judged over places. Table II's are not: its numbers are of another E than real models'."""
BESIDE = ("structure",)
"""What shows where the published numbers lie among the places."""
BEYOND = ("arena",)
"""What lies beyond the paper, all systems of it."""
ROUTINGS = (RECORDED, REAL_MODELS)


def sweeps_over_places() -> dict[str, list[Cell]]:
    """Runs by the name that :func:`over` gives the sweep; none where their routing is not here.

    Where claims are judged, those of entrants and of the systems that claims name: nobody reads a variant's places.
    """
    read = _published_systems()
    found = {}
    for name, (sweep, routings) in names_over_places().items():
        cells = [one for one in expand(sweep, routings) if _is_here(one.config)]
        if sweep in JUDGED:
            cells = [one for one in cells if one.config.system.name in read or one.config.system.entrant]
        found[name] = cells
    return found


def names_over_places(beyond: bool = True) -> dict[str, tuple[str, str]]:
    """The name that :func:`over` gives each, with the sweep and the routings it is of.

    Args:
        beyond: whether what lies beyond the paper is among them.
    """
    sweeps = (*JUDGED, *BESIDE, *(BEYOND if beyond else ()))
    return {over(sweep, routings): (sweep, routings) for routings in ROUTINGS for sweep in sweeps}


def _published_systems() -> set[str]:
    """Names of systems, and other words, in the published claims."""
    table = pd.read_csv(PUBLISHED, usecols=["system", "baseline"], dtype=str).fillna("")
    return set(" ".join(table.to_numpy().ravel()).split())


def _is_here(config: RunConfig) -> bool:
    name = config.routing.source.get("name")  # of a public set; what is recorded is shipped
    return name is None or public_trace(name).exists()
