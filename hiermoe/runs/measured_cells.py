"""Measured sweeps: the files of sweeps/measured/, each with the simulated twin that its numbers are compared with."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from hiermoe.ranks.places import RanksConfig
from hiermoe.records.checksums import Damaged
from hiermoe.records.project import SWEEPS
from hiermoe.records.store import RunStore
from hiermoe.runs.compose import Cell, expand_file, swept
from hiermoe.runs.measurable import Measurable
from hiermoe.runs.run_config import RunConfig

Amount = Literal["quick", "default", "full"]
AMOUNTS: tuple[Amount, ...] = ("quick", "default", "full")

# Folders below sweeps/measured/ that an amount consists of.
_FOLDERS: Mapping[Amount, tuple[str, ...]] = {
    "quick": ("quick",),
    "default": ("",),
    "full": ("full", "full/qwen3"),
}

# On GPUs an iteration takes milliseconds, so nothing is cut down.
_FULL_SIZE: Mapping[str, str] = {"narrowed": "1", "tokens_per_rank": "1024"}


class Dumped(Measurable, Protocol):
    """A run that says all of itself as JSON."""

    def model_dump_json(self, *, exclude: Any) -> str:
        """As pydantic's."""
        ...


C = TypeVar("C", bound=Dumped)


@dataclass(frozen=True)
class MeasuredCell:
    """One measured run, the sweep of the paper that it belongs to, and what the cost model predicts for it.

    Attributes:
        sweep: of the paper.
        named_cluster: that the sweep's file names, whatever cluster it is run on.
        measured: the run.
        predicted: its twin.
    """

    sweep: str
    named_cluster: str
    measured: Cell
    predicted: Cell


def measured_cells(amount: Amount, ranks: RanksConfig | None = None, cluster: str | None = None) -> list[MeasuredCell]:
    """All measured runs of an amount.

    Args:
        amount: quick, default, or full, which has what default has, with more iterations.
        ranks: in the place of those that the files name. On CUDA, tokens and rows have their full size.
        cluster: calibrated one, likewise.

    Raises:
        ValueError: the cluster has not been calibrated, or a configuration that breaks a rule.
    """
    cells = []
    for folder in _FOLDERS[amount]:
        for path in sorted((SWEEPS / "measured" / folder).glob("*.yaml")):
            other, named = {} if cluster is None else {"cluster": cluster}, _named_cluster(path)
            if ranks is not None and ranks.device == "cuda":
                other |= _FULL_SIZE
            for cell in expand_file(path, "config", RunConfig, other):
                config = cell.config if ranks is None else cell.config.model_copy(update={"ranks": ranks})
                twin = config.model_copy(update={"measure": "predict", "ranks": None})
                cells.append(MeasuredCell(path.stem, named, Cell(cell.overrides, config), Cell(cell.overrides, twin)))
    return cells


def clusters_of(amount: Amount) -> list[str]:
    """Names of the clusters, calibrated ones, that the files of an amount name."""
    paths = [path for folder in _FOLDERS[amount] for path in sorted((SWEEPS / "measured" / folder).glob("*.yaml"))]
    if amount == "full":
        paths.append(SWEEPS / "train" / "end_to_end.yaml")
    return list(dict.fromkeys(_named_cluster(path) for path in paths))


def _named_cluster(path: Path) -> str:
    return str(swept(path)["cluster"])


def together(configs: Iterable[C]) -> list[list[C]]:
    """Group runs that differ in their system alone: those are measured interleaved, on the same ranks."""
    groups: dict[str, dict[str, C]] = {}
    for config in configs:
        shared = config.model_dump_json(exclude={"system", "wandb"})
        groups.setdefault(shared, {})[config.run_id] = config
    return [list(group.values()) for group in groups.values()]


def measured_so_far(store: RunStore) -> list[MeasuredCell]:
    """Measured runs of all amounts that have a record, whatever came of them, once for each sweep that has them.

    Systems that are compared on the same tokens are all of one amount: of that in which most were measured, the larger
    one on ties. So an amount that was broken off takes no system from a comparison that is whole.
    """
    found: dict[tuple[str, str], dict[Amount, list[MeasuredCell]]] = {}
    for amount, (ranks, cluster) in product(reversed(AMOUNTS), [(None, None), *allocations_so_far(store)]):
        try:
            cells = measured_cells(amount, ranks, cluster)
        except ValueError:  # a cluster that nobody has calibrated here, so nothing was measured on it
            continue
        for cell in cells:
            if store.has(cell.measured.run_id):
                same = cell.measured.config.model_dump_json(exclude={"system", "iterations", "wandb"})
                found.setdefault((cell.sweep, same), {}).setdefault(amount, []).append(cell)
    return [cell for amounts in found.values() for cell in max(amounts.values(), key=len)]


def allocations_so_far(store: RunStore) -> list[tuple[RanksConfig, str]]:
    """Ranks and calibrated cluster of every kind of allocation that was measured on."""
    found = []
    for run_id in store.run_ids():
        if not run_id.startswith("calibrate-"):
            continue
        try:
            content = store.config(run_id)
        except Damaged:  # what reads its numbers says so
            continue
        ranks = RanksConfig.model_validate(content["ranks"])
        kind = (ranks, content["cluster"]["name"])
        if not ranks.on_this_host and kind not in found:
            found.append(kind)
    return found
