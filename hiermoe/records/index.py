"""An index of runs: what is known of each before anybody reads its record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PREDICTIONS = "predictions"  # simulated twins of the measured runs
RECORDED = "recorded"  # file of sweeps/over/: all layers and stages of the recorded siblings of the paper's models
REAL_MODELS = "real_models"  # another: routing of other models than the paper's


@dataclass(frozen=True)
class IndexedRun:
    """One run of a sweep.

    Attributes:
        run_id: its name in the store.
        config: its configuration, as its command has checked it: system, model, cluster, and how they are measured.
        keys: columns that all rows of its record share: source, system, model, cluster, routing, sizes.
        swept: what the sweep varies, by the last part of the key (``topk``, ``gamma``, ``experiment``, ...).
    """

    run_id: str
    config: Any
    keys: dict[str, Any]
    swept: dict[str, Any]


def over(sweep: str, routings: str) -> str:
    """Name, in an index, of a sweep on other routing than its own.

    Args:
        sweep: name of the sweep.
        routings: file of sweeps/over/.
    """
    return f"{sweep} over {routings}"


@dataclass(frozen=True)
class Renewal:
    """What renews records that other code has made.

    Attributes:
        command: of the shell.
        run_ids: names of these records.
    """

    command: str
    run_ids: tuple[str, ...]


Index = Mapping[str, Sequence[IndexedRun]]  # by sweep, in the sweep's order
