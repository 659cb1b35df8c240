"""Sweeps once more, over other routing than their own: what published models routed, layer after layer."""

from collections.abc import Mapping

from hiermoe.records.index import over
from hiermoe.routing.public import public_set, public_trace
from hiermoe.runs.compose import Cell, expand
from hiermoe.runs.run_config import RunConfig

JUDGED_OVER: Mapping[str, tuple[str, ...]] = {"real_models": ("fig10", "fig11", "structure")}
"""Files of sweeps/over/, and the sweeps that they are laid on. Table II is not: its numbers are of another E."""


def sweeps_over_routings() -> dict[str, list[Cell]]:
    """Runs by the name that :func:`over` gives the sweep; none of routing that is not there."""
    cells = {over(sweep, name): expand(sweep, name) for name, sweeps in JUDGED_OVER.items() for sweep in sweeps}
    return {name: [cell for cell in sweep if _is_there(cell.config)] for name, sweep in cells.items()}


def _is_there(config: RunConfig) -> bool:
    """Whether the set was fetched, and has as many experts a token."""
    if config.routing.name != "public":
        return True
    name = config.routing.source["name"]
    return public_trace(name).exists() and config.model.topk <= (public_set(name).topk or config.model.topk)
