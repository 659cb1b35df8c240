"""What is wrong with a command line that Hydra refuses: every mistake in it, and what may have been meant."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException, OverrideParseException

from hiermoe.records.choices import or_else, unknown
from hiermoe.records.groups import BY_PATH, files_of, group_names


def mistakes(overrides: Sequence[str], compose: Callable[[list[str]], Mapping[str, Any]]) -> list[str]:
    """A line for every override that cannot be read, names a file that is not there, or a key that is not there.

    Args:
        overrides: of the command line.
        compose: makes a configuration of some of them.
    """
    parser, lines, chosen, keys = OverridesParser.create(), [], [], []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except OverrideParseException as error:
            lines.append(f"{text}: {' '.join(str(error.message).split())}")
            continue
        group = override.key_or_group
        if known := files_of(group):
            wrong = [name for name in _names(override) if name not in known and not Path(name).is_file()]
            more = ", or name a .yaml file" if group in BY_PATH else ""
            lines += [str(unknown(group, name, known, more)) for name in wrong]
            if not wrong and not (override.is_add() or _fits(f"{group}={next(iter(known))}", compose)):
                if next(iter(known.values())).read_text(encoding="utf-8").startswith("# @package _global_"):
                    lines.append(f"{group}: not one of the choices, but values for several of them: +{text}")
                else:
                    keys.append(group)
            elif not wrong and override.is_add() and not _fits(text, compose):
                lines.append(f"{text}: not for this command, whose configuration lacks what it gives values to")
            elif not wrong and not isinstance(override.value(), ChoiceSweep):
                chosen.append(text)
        elif not (override.is_add() or override.is_force_add() or override.is_delete() or override.is_hydra_override()):
            keys.append(group)
    config = compose(chosen)
    groups = [group for group in group_names() if keys and _fits(f"{group}={next(iter(files_of(group)), '')}", compose)]
    return [*lines, *(line for key in keys for line in _no_such_key(key, config, groups))]


def _fits(override: str, compose: Callable[[list[str]], Mapping[str, Any]]) -> bool:
    """Whether a configuration has the group that an override chooses from."""
    try:
        compose([override])
    except HydraException:
        return False
    return True


def _names(override: Override) -> list[str]:
    """Files of a group that an override chooses."""
    value = override.value()
    elements = value.list if isinstance(value, ChoiceSweep) else [value]
    return [str(getattr(element, "text", element)) for element in elements if element is not None]


def _no_such_key(key: str, config: Mapping[str, Any], groups: Sequence[str]) -> Iterator[str]:
    """A line, where a configuration has no such key, nor such a group."""
    node: Any = config
    for depth, part in enumerate(key.split(".")):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, Mapping) and part in node:
            node = node[part]
        elif depth == 0 and key != part and files_of(part):
            last = key.rpartition(".")[2]
            yield f"{key}: there is no {part} yet; choose {part}= too" + f", or say {last}=" * (last in config)
            return
        else:
            known = [*node, *(groups if depth == 0 else ())] if isinstance(node, Mapping) else []
            yield f"{key}: no such key; {or_else(part, dict.fromkeys(known))}"
            return
