"""What every column of the table of records means; options are explained by the code that takes them."""

import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from hiermoe.records.groups import files_of
from hiermoe.records.meanings import MEANINGS
from hiermoe.records.options import KEYS, is_told
from hiermoe.runs.calibration import CalibrationConfig
from hiermoe.runs.run_config import RunConfig
from hiermoe.runs.training import NO_CONTENT, TrainRunConfig

# Of the table alone, of a training's content, and what runs are started with.
_OTHERS: Mapping[str, str] = {
    "corpus": "Name of what a training reads.",
    "text": "Digest of the text that a training reads, and of how it is tokenised and ordered.",
    "start": "Digests of the files of the checkpoint that a training began from, numbered; [] for none.",
}
_BUILT = {"system": ("schemes", "policy"), "routing": ("source",)}  # parts of files in conf/ that name what builds them


def column_meanings() -> dict[str, str]:
    """Every column that the table of all records may have, with its meaning; N stands for a place in a list."""
    found = dict(MEANINGS)
    for schema in (RunConfig, TrainRunConfig, CalibrationConfig):
        for name, meaning in _fields(schema, ""):
            found.setdefault(name, meaning)
    for group, parts in _BUILT.items():
        for part in parts:
            del found[f"{group}.{part}"]
            found |= dict(_arguments(group, part))
    left_out = NO_CONTENT | {"name", "corpus"}  # where files are kept, a calibration's name, what texts are made of
    kept = {name: text for name, text in found.items() if name.partition(".")[0] not in left_out and name not in KEYS}
    for name in kept.keys() - MEANINGS.keys():
        kept[name] = f"{kept[name][:1].upper()}{kept[name][1:]}"
    return {**kept, **_OTHERS}


def meaning_of(column: str) -> str:
    """Of one column of a table.

    Raises:
        KeyError: there is none: records of other code have it.
    """
    return column_meanings()[re.sub(r"\.\d+(?=\.|$)", ".N", column)]


def described(thing: Any, section: str) -> dict[str, str]:
    """Names and their explanations in a section (Args, Attributes) of a docstring."""
    text = inspect.getdoc(thing) or ""
    body = re.search(rf"^{section}:\n((?: {{4}}.*\n?|\n)*)", text, re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {6,}.*)*)", body.group(1) if body else "", re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in entries}


def _fields(schema: type[BaseModel], path: str) -> Iterator[tuple[str, str]]:
    """Every option below a schema. Parts that are schemas themselves say what they are; lists have an N."""
    explained: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        explained |= described(base, "Attributes")
    for name, field in schema.model_fields.items():
        listed = ".N" if "tuple" in str(field.annotation) else ""
        option, parts = f"{path}{name}", list(_schemas(field.annotation))
        if is_told(option, None):
            continue
        for part in parts:
            yield from _fields(part, f"{option}{listed}.")
        if not parts or listed:
            yield option, explained.get(name) or _first_line(schema)


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _schemas(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _schemas(part)


def _arguments(group: str, part: str) -> Iterator[tuple[str, str]]:
    """Options of what files of a group build, each by what takes it."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in files_of(group).values():
        target = yaml.safe_load(path.read_text(encoding="utf-8"))[part]["_target_"]
        module, _, name = target.rpartition(".")
        thing = getattr(import_module(module), name)
        explained = described(thing, "Args") | described(thing, "Attributes")
        if isinstance(thing, type):
            explained |= described(thing.__init__, "Args")
        for argument in inspect.signature(thing).parameters:
            if argument not in ("request", "hierarchy"):
                found.setdefault(argument, {}).setdefault(explained.get(argument) or _first_line(thing), []).append(
                    name
                )
    yield f"{group}.{part}._target_", f"Module and name of what makes the {group}'s {part}."
    for argument, meanings in found.items():
        told = "; ".join(f"{', '.join(dict.fromkeys(names))}: {text}" for text, names in meanings.items())
        yield f"{group}.{part}.{argument}", told
