"""Help of the commands that Hydra composes: every choice and every option with its line, from the files of conf/."""

import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from hiermoe.records.groups import files_of
from hiermoe.records.project import CONF

NARROWEST, WIDEST = 60, 120


def help_text(config_name: str) -> str:
    """What `--help` prints.

    Args:
        config_name: primary configuration in conf/, whose ``hydra.help.template`` says where choices and options go.
    """
    path = CONF / f"{config_name}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    template = content["hydra"]["help"]["template"]
    choices = _choices(content["defaults"])
    if "systems" in content:
        choices = "\n".join([choices, "systems=[...]   (if not said: all)", *_lines(files_of("system"))])
    return template.replace("$APP_CONFIG_GROUPS", choices).replace("$CONFIG", _options(path))


def described(path: Path) -> str:
    """What the head of a file says it is: the first sentence of its comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = lines[: next(number for number, line in enumerate([*lines, ""]) if not line.startswith("#"))]
    said = [line[2:] for line in head if not re.match(r"# (@package|hiermoe |  )", line)]
    return re.split(r"(?<!\bFig)(?<!\bSec)(?<!\be\.g)(?<!\.)\. ", " ".join(said))[0].removesuffix(".")


def _choices(defaults: list[object]) -> str:
    """All files of every group, one a line, with what they are."""
    groups = {group: name for entry in defaults if isinstance(entry, dict) for group, name in entry.items()}
    parts = []
    for group, default in groups.items():
        if not group.startswith("override "):
            parts.append(f"{group}=" + (f"   (if not said: {default})" if default else ""))
            parts += _lines(files_of(group))
    if "measure" in groups:
        parts += ["+sweeps=   (with -m)", *_lines(files_of("sweeps"))]
        parts += ["+experiment=", *_lines(files_of("experiment"))]
    if "corpus" in groups and "system" not in groups:
        parts += ["+recording=", *_lines(files_of("recording"))]
    return "\n".join(parts)


def _lines(files: Mapping[str, Path]) -> Iterator[str]:
    """Name and description, wrapped beside the names."""
    width = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    column = max(map(len, files), default=0) + 4
    for name, path in files.items():
        lead = f"  {name}".ljust(column)
        yield textwrap.fill(described(path), width, initial_indent=lead, subsequent_indent=" " * column)


def _options(path: Path) -> str:
    """The file's own keys with their values and comments, as they stand there."""
    text = path.read_text(encoding="utf-8")
    after_defaults = re.split(r"^defaults:\n(?:[ #].*\n|\n)*", text, maxsplit=1, flags=re.MULTILINE)[1]
    return after_defaults.partition("\nhydra:")[0].rstrip()
