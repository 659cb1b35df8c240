"""The options of a run, flat: what its name is made of, and what its record has a column for, each.

An option is called as on the command line, ``system.policy.gamma``; entries of lists count from 0. Where every record
has a column of the same meaning (``topk`` for ``model.topk``), that is its column, so one thing has one.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

# How things are shown, and what is told of them: no number comes from these, so they name no run.
_TOLD = {"label", "color", "placement_label", "placement_color", "entrant", "description"}
_SOURCE = "source"  # of a constant or a size: words; of routing: what makes it, a mapping

KEYS: Mapping[str, str] = {
    "system.name": "system",
    "model.name": "model",
    "cluster.name": "cluster",
    "routing.name": "routing",
    "model.num_experts": "num_experts",
    "model.topk": "topk",
}
"""Columns of every record, by the option that they have the value of."""


def options(content: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a run.

    Args:
        content: the run's configuration, as JSON-ready values.

    Returns:
        Option -> a number, a text, a truth value or None. What an option names in ``_target_`` is called by module and
        function, wherever the module lies.
    """
    return dict(_flat(content, ""))


def option_columns(content: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the names of columns; those that are None are left out, which reads as empty."""
    named = {KEYS.get(name, name): value for name, value in options(content).items()}
    return {name: value for name, value in named.items() if value is not None}


def is_told(option: str, value: Any) -> bool:
    """Whether an entry of a configuration is shown or told, so that no number comes from it."""
    name = option.rpartition(".")[2]
    return name in _TOLD or (name == _SOURCE and not isinstance(value, dict) and option != "routing.source")


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    name = path.rpartition(".")[2]
    if is_told(path, value):
        return
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and value:
        for place, item in enumerate(value):
            yield from _flat(item, f"{path}.{place}")
    elif isinstance(value, dict | list | tuple):
        yield path, json.dumps(value)
    else:
        yield path, ".".join(value.split(".")[-2:]) if name == "_target_" else value
