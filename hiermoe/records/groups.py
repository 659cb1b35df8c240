"""Groups of configurations, a folder of conf/ each: the suite's files, and those that a user has beside them.

A user's own lie in the same folders below conf/ of the workplace. They add to the suite's and never stand for one of
them.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml

from hiermoe.records.choices import unknown
from hiermoe.records.project import CLUSTERS, CONF, SWEEPS, WORKPLACE, shown
from hiermoe.records.strict import Schema, checked

OWN = WORKPLACE / "conf"
BY_PATH = ("cluster", "model")  # groups of which a command may name any file
SWEEP_FOLDERS = tuple(dict.fromkeys([SWEEPS, WORKPLACE / SWEEPS.name]))  # they, and folders in them, are groups too


def files_of(group: str) -> dict[str, Path]:
    """The files of a group by name, in alphabetical order; none where there is no such group.

    Clusters are also what `hiermoe calibrate` has written.

    Raises:
        ValueError: two have one name.
    """
    folders = [CONF / group, OWN / group]
    if group == "cluster":
        folders.append(CLUSTERS)
    if group.split("/")[0] == SWEEPS.name:
        folders = [root.parent / group for root in SWEEP_FOLDERS]
    found: dict[str, Path] = {}
    for folder in dict.fromkeys(folders):
        for path in folder.glob("*.yaml"):
            if path.stem in found:
                there = shown(found[path.stem])
                raise ValueError(f"{path}: there is a {group} of that name already, {there}; give this file another")
            found[path.stem] = path
    return dict(sorted(found.items()))


def file_of(group: str, name: str) -> Path:
    """The file of a group that has a name, or that a path ending in ``.yaml`` names, as far as that group allows it.

    Raises:
        ValueError: there is none.
    """
    by_path = group in BY_PATH
    if by_path and name.endswith(".yaml") and Path(name).is_file():
        return Path(name)
    known = files_of(group)
    if by_path and name.endswith(".yaml"):
        raise ValueError(f"{group}={name}: there is no such file")
    if name not in known:
        raise unknown(group, name, known, ", or name a .yaml file" if by_path else "")
    return known[name]


def check_is_free(name: str) -> None:
    """Let a calibration write a cluster's file of a name: anew, or over a calibrated one.

    Raises:
        ValueError: it is that of a file of conf/cluster/, shipped or a user's own.
    """
    there = files_of("cluster").get(name)
    if there is not None and there.parent != CLUSTERS:
        raise ValueError(f"name={name}: {shown(there)} is that cluster's file; give this one another")


def read_named(group: str, name: str, schema: type[Schema]) -> Schema:
    """What the file of a group says, as its schema has it.

    Raises:
        ValueError: there is no such file, or it breaks a rule.
    """
    path = file_of(group, name)
    return checked(yaml.safe_load(path.read_text(encoding="utf-8")), schema, shown(path))


def is_group(name: str) -> bool:
    """Whether conf/ has such a group."""
    return any((root / name).is_dir() for root in (CONF, OWN))


def group_names() -> list[str]:
    """All groups of conf/."""
    return sorted({path.name for root in (CONF, OWN) if root.is_dir() for path in root.iterdir() if path.is_dir()})


def outside_of_conf() -> Iterator[tuple[str, Path]]:
    """Files that Hydra does not find in conf/, each after its group: sweeps, calibrated clusters, a user's own."""
    sweeps = {path.parent.relative_to(root.parent) for root in SWEEP_FOLDERS for path in root.rglob("*.yaml")}
    for group in sorted({*(folder.as_posix() for folder in sweeps), *group_names()}):
        yield from ((group, path) for path in files_of(group).values() if not path.is_relative_to(CONF))
