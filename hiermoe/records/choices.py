"""A name that is not there: what its writer may have meant, else what there is."""

from collections.abc import Iterable
from difflib import get_close_matches


def or_else(name: str, known: Iterable[str], more: str = "") -> str:
    """How a message about an unknown name goes on: ``did you mean hd2 or hd3?``, else ``choose from h1, hd2``.

    Args:
        name: as written.
        known: names that there are.
        more: what else may be written, after these.
    """
    names = list(dict.fromkeys(known))
    parts = [one for one in names if len(name) > 2 and name.lower() in one]
    if near := list(dict.fromkeys([*get_close_matches(name.lower(), names, n=3, cutoff=0.7), *parts]))[:3]:
        return f"did you mean {' or '.join(near)}?"
    return f"choose from {', '.join(names)}{more}" if names else f"there is none{more}"


def unknown(what: str, name: str, known: Iterable[str], more: str = "") -> ValueError:
    """The error for a value that names nothing: ``system=hd22 is unknown; did you mean hd2 or hd1?``."""
    return ValueError(f"{what}={name} is unknown; {or_else(name, known, more)}")
