"""Configurations from conf/, and the runs of a sweep.

Hydra composes what a command line says. A sweep is composed once: its runs are that configuration with other files of
some groups and other values in it, and these are laid on here, a hundred times faster than Hydra composes each run.
What cannot be laid on so is refused.
"""

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Generic, cast

import hydra
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel
from typing_extensions import TypeVar
from yaml import YAMLError

from hiermoe.records.choices import or_else, unknown
from hiermoe.records.groups import BY_PATH, file_of, files_of, is_group, outside_of_conf
from hiermoe.records.project import CONF, SWEEPS, shown
from hiermoe.records.strict import BrokenRules, checked
from hiermoe.runs.command_line import mistakes
from hiermoe.runs.measurable import Measurable
from hiermoe.runs.run_config import RunConfig

C = TypeVar("C", bound=BaseModel, default=RunConfig)

REFUSED = (HydraException, OmegaConfBaseException)
"""What Hydra raises where it cannot compose what a command line says."""

_EVERYWHERE = "# @package _global_"  # the first line of a file whose keys start at the configuration's root


@dataclass(frozen=True)
class Cell(Generic[C]):
    """One run of a sweep: its own overrides, and the configuration that they give."""

    overrides: tuple[str, ...]
    config: C

    @cached_property
    def run_id(self) -> str:
        """The name of the run, found out once: it is a hash of everything that its configuration says."""
        return cast(Measurable, self.config).run_id


def register(arguments: Sequence[str] = ()) -> None:
    """Tell Hydra what is not in conf/; to be called before it composes.

    These are sweeps/, as the group ``sweeps``, calibrated clusters, a user's own files, and clusters and models that
    the command line names by path; a file that says no name is called by its own.

    Args:
        arguments: of the command line.

    Raises:
        ValueError: a file of them is no YAML.
    """
    store = ConfigStore.instance()
    for group, path in outside_of_conf():
        everywhere = group.split("/")[0] == SWEEPS.name or path.read_text(encoding="utf-8").startswith(_EVERYWHERE)
        store.store(group=group, name=path.stem, node=_load(path), package="_global_" if everywhere else None)
    for group, _, paths in (argument.partition("=") for argument in arguments):
        for path in paths.split(",") if group in BY_PATH else ():
            if path.endswith(".yaml") and Path(path).is_file():
                *folders, _ = filter(None, path.split("/"))
                node = OmegaConf.merge({"name": Path(path).stem}, _load(Path(path)))
                store.store(group="/".join([group, *folders]), name=Path(path).stem, node=node)


def with_entrants(group: str, *listed: str) -> str:
    """What a sweep compares: what it lists, and every other file of the group that says ``entrant: true``.

    Args:
        group: folder of conf/.
        listed: names of its files.
    """
    texts = {name: path.read_text(encoding="utf-8") for name, path in files_of(group).items()}
    entrants = [name for name, text in texts.items() if re.search(r"^entrant:\s*true\b", text, re.MULTILINE)]
    return ",".join(dict.fromkeys([*listed, *entrants]))


OmegaConf.register_new_resolver("entrants", with_entrants, replace=True)  # ${entrants:system,megatron,hiermoe}


def compose(config_name: str, overrides: Sequence[str], schema: type[C]) -> C:
    """What Hydra's command line makes of these overrides, outside of it.

    Args:
        config_name: primary configuration in conf/.
        overrides: as on the command line.
        schema: of that configuration.

    Raises:
        ValueError: an unknown name, or a value that breaks a rule.
    """
    return checked(plain(_composed(config_name, overrides)), schema)


def plain(config: DictConfig) -> dict[str, Any]:
    """A composed configuration without OmegaConf, interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value] - a mapping, as all of conf/


def _composed(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    try:
        return _by_hydra(config_name, overrides)
    except REFUSED as error:
        raise refusal(config_name, overrides, error) from error


def _by_hydra(config_name: str, overrides: Sequence[str]) -> DictConfig:
    register(overrides)
    previous = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3", job_name="hiermoe"):
            return hydra.compose(config_name, list(overrides))
    finally:
        GlobalHydra.instance().hydra = previous


def refusal(config_name: str, overrides: Sequence[str], error: Exception) -> ValueError:
    """What Hydra refused, in our words: all that is wrong with the overrides, else its own message in one line."""
    lines = mistakes(overrides, lambda some: plain(_by_hydra(config_name, some)))
    return BrokenRules(lines or [" ".join(str(error).split())])


@cache
def _base(config_name: str) -> dict[str, Any]:
    base = _composed(config_name)
    if "${" in OmegaConf.to_yaml(base):
        raise ValueError(f"conf/{config_name}.yaml: only Hydra composes interpolations")
    defaults = _own(config_name)["defaults"]
    without = {
        group: name for entry in defaults if isinstance(entry, dict) for group, name in entry.items() if name is None
    }
    return {**without, **plain(base)}


@cache
def _own(config_name: str) -> dict[str, Any]:
    """What the primary file itself says; it comes after its groups (``_self_``), and is stronger."""
    return OmegaConf.to_container(_load(CONF / f"{config_name}.yaml"))  # type: ignore[return-value] - a mapping


def sweep_names() -> list[str]:
    """Names of all sweeps, in alphabetical order."""
    return list(files_of("sweeps"))


def large_sweep_names() -> list[str]:
    """Names of the sweeps that take minutes by themselves and run only where they are named."""
    return [f"large/{name}" for name in files_of("sweeps/large")]


def expand(name: str, over: str | None = None) -> list[Cell]:
    """All runs of a sweep, as ``hiermoe run -m +sweeps=<name>`` would run them.

    Args:
        name: of the sweep.
        over: file of sweeps/over/ whose values take the place of the sweep's own (``+sweeps/over=<name>``).

    Raises:
        ValueError: no such sweep, or a configuration that breaks a rule.
    """
    folder, _, stem = f"sweeps/{name}".rpartition("/")
    if stem not in files_of(folder):
        raise unknown("sweep", name, [*sweep_names(), *large_sweep_names()])
    instead = None if over is None else swept(files_of("sweeps/over")[over])
    return expand_file(files_of(folder)[stem], "config", RunConfig, instead)


def expand_file(
    path: Path, config_name: str, schema: type[C], instead: Mapping[str, Any] | None = None
) -> list[Cell[C]]:
    """All runs of a sweep's file, in Hydra's order.

    Args:
        path: below sweeps/.
        config_name: primary configuration in conf/.
        schema: of that configuration.
        instead: values in the place of those that the file gives.

    Raises:
        ValueError: a configuration that breaks a rule, a name that no file has, or what only Hydra can compose.
    """
    base, own, read = _base(config_name), _own(config_name), cache(_read_choice)
    cells = []
    try:
        params = {**swept(path), **(instead or {})}
        for texts in product(*(_choices(key, value) for key, value in params.items())):
            changes = dict(zip(params, texts, strict=True))
            overrides = tuple(f"{key}={text}" for key, text in changes.items())
            cells.append(Cell(overrides, checked(_laid_on(base, own, changes, read), schema)))
    except BrokenRules as error:
        raise BrokenRules(error.lines, shown(path)) from error
    except ValueError as error:
        raise ValueError(f"{shown(path)}: {error}") from error
    return cells


def swept(path: Path) -> dict[str, Any]:
    """What a sweep's file varies, by key: one value, or several with commas between them.

    Raises:
        ValueError: it says something else too, which only Hydra would heed.
    """
    sweep = _load(path)
    params = OmegaConf.select(sweep, "hydra.sweeper.params")
    said = OmegaConf.to_container(sweep)
    if params is None or said != {"hydra": {"sweeper": {"params": OmegaConf.to_container(params)}}}:
        raise ValueError("a sweep's file holds hydra.sweeper.params, and nothing else")
    return {str(key): value for key, value in params.items()}


def _choices(key: str, value: Any) -> list[str]:
    """The values that a key takes, each as in an override."""
    if not isinstance(value, str):
        return [json.dumps(value)]
    if re.search(r"[()\[\]{}'\"]", value):
        raise ValueError(f"{key}={value}: values with commas between them are laid on, and nothing else of Hydra's")
    return [part.strip() for part in value.split(",")]


@dataclass(frozen=True)
class _Choice:
    """A file of a group.

    Attributes:
        content: without its defaults.
        everywhere: whether it starts at the configuration's root and not at the group's key.
        choices: files of other groups that its defaults name; None where a group is to have none.
    """

    content: dict[str, Any]
    everywhere: bool
    choices: dict[str, str | None]


def _read_choice(group: str, name: str) -> _Choice:
    path = file_of(group, name)
    text = path.read_text(encoding="utf-8")
    everywhere = text.startswith(_EVERYWHERE)
    content: Any = OmegaConf.to_container(_load(path))
    choices = {}
    for entry in content.pop("defaults", []):
        ((key, value),) = entry.items() if isinstance(entry, dict) else [(entry, None)]
        if not everywhere or not key.startswith("override /") or not isinstance(value, str | None):
            raise ValueError(f"{shown(path)}: only Hydra composes defaults other than 'override /<group>: <name>'")
        choices[key.removeprefix("override /")] = value
    if "${" in str(content) or "@package" in text.removeprefix(_EVERYWHERE):
        raise ValueError(f"{shown(path)}: only Hydra composes interpolations, and packages other than _global_")
    return _Choice(content, everywhere, choices)


def _laid_on(
    base: Mapping[str, Any],
    own: Mapping[str, Any],
    changes: Mapping[str, str],
    read: Callable[[str, str], _Choice],
) -> dict[str, Any]:
    """A configuration with some changes.

    Args:
        base: plain values.
        own: what the primary file itself says, of groups too.
        changes: texts by key: another file of a group that the base has, with ``+`` a file of a group that it has not,
            a value for a key that it has, with ``+`` for a key that it has not.
        read: what reads a file of a group.
    """
    chosen = {key: text for key, text in changes.items() if is_group(key.removeprefix("+"))}
    files = {key: read(key.removeprefix("+"), name) for key, name in chosen.items()}
    roots = [file for file in files.values() if file.everywhere]
    if any(key.startswith("+") and not file.everywhere for key, file in files.items()):
        raise ValueError(f"only Hydra adds a group whose files do not begin with '{_EVERYWHERE}'")
    groups: dict[str, str | None] = {}
    for file in roots:
        groups |= file.choices
    groups |= {key: name for key, name in chosen.items() if not key.startswith("+")}  # named, so stronger than implied
    if unknown := groups.keys() - base.keys():
        raise ValueError(f"{', '.join(sorted(unknown))}: this configuration has no such group")
    config = copy.deepcopy({key: value for key, value in base.items() if key not in groups})
    for group, name in groups.items():
        if name is not None and not (file := read(group, name)).everywhere:
            config[group] = copy.deepcopy(file.content)
            _merge(config, copy.deepcopy({group: own.get(group, {})}))
    for file in roots:
        _merge(config, file.content)
    for key, text in changes.items():
        if key not in chosen:
            _set(config, key, _value(text))
    return config


@lru_cache(maxsize=4096)
def _value(text: str) -> Any:
    """What a text on the command line means."""
    return OmegaConf.create(f"value: {text}").value


def _merge(config: dict[str, Any], content: Mapping[str, Any]) -> None:
    for key, value in content.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _merge(config[key], value)
        else:
            config[key] = value


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    """Give a key that is there another value, or with ``+`` one that is not there its first."""
    adds, node = key.startswith("+"), config
    *parents, last = key.removeprefix("+").split(".")
    for part in parents:
        node = node.get(part)
        if not isinstance(node, dict):
            raise ValueError(f"{key}: this configuration has no {part} with keys of its own")
    if (last in node) == adds:
        wrong = "such a key already" if adds else f"no such key; {or_else(last, node)}"
        raise ValueError(f"{key}: this configuration has {wrong}")
    node[last] = value


def _load(path: Path) -> Any:
    """A file's content, not to be changed: hundreds of sweeps' runs name the same few files."""
    return _parsed(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=512)
def _parsed(path: Path, _modified_ns: int) -> Any:
    try:
        return OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{shown(path)} is no YAML: {' '.join(str(error).split())}") from error
