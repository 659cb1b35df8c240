"""Stale records: those of runs that the present code would call by another name, and the commands that renew them."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hiermoe.measure.registry import MEASUREMENTS
from hiermoe.records.checksums import Damaged
from hiermoe.records.index import Index, Renewal
from hiermoe.records.options import options
from hiermoe.records.store import RunStore
from hiermoe.runs.calibration import CalibrationConfig
from hiermoe.runs.compose import compose, expand, large_sweep_names, sweep_names
from hiermoe.runs.measured_cells import AMOUNTS, measured_cells
from hiermoe.runs.run_config import RunConfig
from hiermoe.runs.training import TrainRunConfig

Config = RunConfig | CalibrationConfig | TrainRunConfig

_PRIMARY: Mapping[str, tuple[str, type[Config]]] = {
    "run": ("config", RunConfig),
    "calibrate": ("calibrate", CalibrationConfig),
    "train": ("train", TrainRunConfig),
}
_GROUPS = ("system", "model", "cluster", "routing", "ranks")
_IMPLIED = {"ep_size", "text", "start"}  # of a training's content, by other options
_FLAGS = {"quick": " --quick", "default": "", "full": " --full"}


@dataclass(frozen=True)
class StaleRun:
    """A run whose record is stale.

    Attributes:
        run_id: name of the record.
        content: its configuration.
        command: that made it, as its provenance tells.
        config: the same configuration as the present schema has it; None where that refuses it.
        renewed: whether the run has another record, by the present code.
    """

    run_id: str
    content: dict[str, Any]
    command: str
    config: Config | None
    renewed: bool


def stale_runs(store: RunStore, run_ids: Iterable[str] | None = None) -> list[StaleRun]:
    """The runs of a store whose records are stale.

    Args:
        store: where records are.
        run_ids: those to look at; None for all.
    """
    found = (_looked_at(store, run_id) for run_id in (store.run_ids() if run_ids is None else run_ids))
    return [run for run in found if run is not None]


def stale_in_place_of(index: Index, store: RunStore) -> list[Renewal]:
    """What renews the stale records among those that an index does not name."""
    named = {run.run_id for runs in index.values() for run in runs}
    return renewals(stale_runs(store, [run_id for run_id in store.run_ids() if run_id not in named]))


def _looked_at(store: RunStore, run_id: str) -> StaleRun | None:
    try:
        content, provenance = store.config(run_id), store.provenance(run_id)
    except (FileNotFoundError, Damaged):
        return None  # no whole record, so neither new nor old
    config, renewed = None, False
    with suppress(ValueError, KeyError):  # what nobody can ask for any more is stale
        config = _PRIMARY[MEASUREMENTS[content["measure"]].command][1].of_content(content)
        name = config.named_on(provenance["host"], content)
        if name == run_id:
            return None
        renewed = store.has(name)
    return StaleRun(run_id, content, provenance["command"], config, renewed)


def renewals(stale: Sequence[StaleRun]) -> list[Renewal]:
    """What renews stale records that nothing has renewed yet, every command once, with the records that it renews.

    A run of a sweep is renewed with its sweep, any other by its own command; where nothing asks for it any more, the
    command that made it makes what has taken its place.
    """
    stale = [run for run in stale if not run.renewed]
    commands: dict[str, list[str]] = {}
    left = {run.run_id: run for run in stale}
    by_meaning: dict[str, list[str]] = {}
    for run in stale:
        if run.config is not None:
            by_meaning.setdefault(_meaning(run.config), []).append(run.run_id)
    sweeps: list[str] = []
    in_sweeps: list[str] = []
    for command, meanings in _known(bool(by_meaning)):
        names = [name for meaning in meanings for name in by_meaning.get(meaning, ()) if left.pop(name, None)]
        if not names:
            continue
        if command in (*sweep_names(), *large_sweep_names()):
            sweeps.append(command)
            in_sweeps += names
        else:
            commands[command] = names
    if sweeps:
        commands = {f"hiermoe reproduce --sweeps {' '.join(sweeps)}": in_sweeps, **commands}
    for run in left.values():
        command = None if run.config is None else command_of(run.config)
        commands.setdefault(command or run.command, []).append(run.run_id)
    return [Renewal(command, tuple(names)) for command, names in commands.items()]


def _known(wanted: bool) -> Iterator[tuple[str, list[str]]]:
    """Sweeps by name, and commands that measure, with the meanings of their runs."""
    if not wanted:
        return
    for name in (*sweep_names(), *large_sweep_names()):
        yield name, list(dict.fromkeys(_meaning(cell.config) for cell in expand(name)))
    for amount in AMOUNTS:
        with suppress(ValueError):  # a cluster that nobody has calibrated here
            cells = [cell for one in measured_cells(amount) for cell in (one.measured, one.predicted)]
            yield f"hiermoe reproduce{_FLAGS[amount]}", [_meaning(cell.config) for cell in cells]


def _meaning(config: Config) -> str:
    """What a run is asked to do, whatever code does it."""
    return json.dumps(options(config.content), sort_keys=True)


def command_of(config: Config) -> str | None:
    """The command line that asks for a run.

    Returns:
        The command; None where there is none, because the run has what no file of conf/ and no override says.
    """
    command = config.measurement.command
    primary, schema = _PRIMARY[command]
    chosen = {group: getattr(config, group, None) for group in _GROUPS}
    overrides = {group: part.name.partition("@")[0] for group, part in chosen.items() if part is not None}
    if isinstance(config, RunConfig):
        overrides["measure"] = config.measure
    elif isinstance(config, TrainRunConfig) or "@" in config.cluster.name:
        overrides["world_size"] = str(config.cluster.hierarchy.num_ranks * config.ep_groups)
    wanted = options({key: value for key, value in config.content.items() if key not in _IMPLIED})
    for single in (False, True):  # sizes first: they may change a cluster, which the rest is part of
        try:
            found = options(compose(primary, _as_arguments(overrides), schema).content)
        except ValueError:
            return None
        for key, value in wanted.items():
            if found.get(key) != value and (single or "." not in key):
                overrides[f"++{key}" if single else key] = json.dumps(value)  # ++: whether its file has it or not
    with suppress(ValueError):
        if _meaning(compose(primary, _as_arguments(overrides), schema)) == _meaning(config):
            return shlex.join(["hiermoe", command, *_as_arguments(overrides)])
    return None


def _as_arguments(overrides: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in overrides.items()]
