"""Output for terminals that know few letters, ASCII alone for one: others are written as those come nearest."""

import codecs
import io
import sys
import unicodedata

_PLAIN = str.maketrans(
    {"×": "x", "·": "-", "–": "-", "—": "-", "…": "...", "→": "->", "≤": "<=", "≥": ">=", "α": "alpha", "β": "beta"}
    | {"γ": "gamma", "✓": "+", "✗": "x", "≈": "~", "µ": "u", "±": "+-", "−": "-", "“": '"', "”": '"', "’": "'"}
)


def _in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    """What a stream writes for letters that it cannot."""
    assert isinstance(error, UnicodeEncodeError)
    text = unicodedata.normalize("NFKD", error.object[error.start : error.end].translate(_PLAIN))
    return "".join(letter if letter.isascii() else "?" for letter in text), error.end


def print_plain_letters_where_needed() -> None:
    """Have this process's output and errors do so; to be called once, before anything is printed."""
    codecs.register_error("hiermoe.plain", _in_plain_letters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="hiermoe.plain")
