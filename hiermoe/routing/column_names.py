"""Names of columns: people call the same thing by several."""

import re
from collections.abc import Sequence

_NUMBERED = ("", "id", "ids", "idx", "index", "num", "number")
NAMES: dict[str, frozenset[str]] = {
    "layer": frozenset(f"{start}layer{end}" for start in ("", "moe") for end in _NUMBERED),
    "expert": frozenset(f"{start}expert{end}" for start in ("", "logical") for end in _NUMBERED) | {"experts"},
    "load": frozenset(
        ("load", "loads", "count", "counts", "tokens", "numtokens", "tokencount", "frequency", "freq", "hits", "usage")
    ),
    "step": frozenset(("step", "steps", "iteration", "iter", "trainingstep")),
    "token": frozenset(("token", "tokenid", "tokenidx", "tokenindex", "position")),
    "indices": frozenset(
        ("indices", "topindices", "topkindices", "topkids", "topkexperts", "expertids", "selectedexperts")
    ),
}
"""For each thing the names that it may have, in small letters and digits."""


def find_columns(
    origin: object, header: Sequence[str], needed: Sequence[str], more: Sequence[str] = ()
) -> dict[str, int]:
    """Where each thing stands in a header; columns of other names are nobody's.

    Args:
        origin: of the header, for the message.
        header: names as written.
        needed: things that must be there.
        more: things that may.

    Raises:
        ValueError: one is missing, or there under two names.
    """
    written = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in header]
    found: dict[str, int] = {}
    for thing in (*needed, *more):
        places = [place for place, name in enumerate(written) if name in NAMES[thing]]
        if len(places) > 1:
            names = " and ".join(header[place].strip() for place in places)
            raise ValueError(f"{origin} has the columns {names}, which both may be the {thing}: leave one of them")
        if not places and thing in needed:
            named = ",".join(name.strip() for name in header)
            raise ValueError(f"{origin} has the columns {named}; the rule is {','.join(needed)}")
        if places:
            found[thing] = places[0]
    return found
