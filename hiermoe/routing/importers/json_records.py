"""JSON objects one after another, however laid out: a line each, pretty-printed, in one array, files merged."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pajson

from hiermoe.routing.text_file import parts

Record = tuple[int, bytes]  # number of the line that it begins in, and its text

_BATCH_BYTES = 2**25  # at least; a batch holds the longest record
_BLOCK_BYTES = 2**23  # of a batch, parsed at once by one thread
_LONGEST_BYTES = 2**30  # Arrow counts in 32 bits
_ESCAPED = re.compile(rb"\\.", re.DOTALL)
_BETWEEN = (
    b" \t\r\n,[]\xef\xbb\xbf"  # what may stand between objects: ends of lines, an array's signs, marks of encoding
)
_QUOTE, _OPEN, _CLOSE = b'"{}'


def batches(path: Path, schema: pa.Schema) -> Iterator[tuple[list[int], pa.Table]]:
    """The objects of a file, many at once: the line that each begins in, and a table with a row for each.

    Args:
        path: of the text.
        schema: what is wanted of the objects; a key that one lacks is null.

    Raises:
        ValueError: something is no object, cut, or of another type; with file and line.
    """
    held: list[Record] = []
    size = 0
    for record in objects(path):
        held.append(record)
        size += len(record[1]) + 1
        if size >= _BATCH_BYTES:
            yield [line for line, _ in held], _parsed(path, held, schema)
            held, size = [], 0
    if held:
        yield [line for line, _ in held], _parsed(path, held, schema)


def objects(path: Path) -> Iterator[Record]:
    """The outermost objects of a text, arrays around them or not.

    Only quotes and braces are looked at; whether an object is well formed is for its parser to say.

    Raises:
        ValueError: something stands between objects, or the last has no end.
    """
    line, began = 1, 1  # of what comes next; of the object that is open
    depth, inside, pending, open_parts = 0, False, b"", []
    for part in parts(path):
        part = pending + part
        kept = part.rstrip(b"\\")  # what is escaped must not lie in the next part
        part, pending = kept, part[len(kept) :]
        signs = np.frombuffer(_ESCAPED.sub(b"__", part) if b"\\" in part else part, np.uint8)
        quotes = np.flatnonzero(signs == _QUOTE)
        braces = np.flatnonzero((signs == _OPEN) | (signs == _CLOSE))
        braces = braces[(np.searchsorted(quotes, braces) + inside) % 2 == 0]
        inside ^= bool(len(quotes) % 2)
        opening = signs[braces] == _OPEN
        depths = depth + np.cumsum(np.where(opening, 1, -1))
        outer = braces[np.where(opening, depths == 1, depths <= 0)]
        at = 0
        for place in outer.tolist():
            if depth == 0:
                line = _checked_gap(path, line, part[at:place])
                began, at, depth = line, place, 1
                if part[place] == _CLOSE:
                    raise ValueError(f"{path}: line {line} is malformed: a brace closes nothing")
            else:
                text = b"".join([*open_parts, part[at : place + 1]])
                yield began, text.replace(b"\n", b" ").replace(b"\r", b" ") if b"\n" in text else text
                line, at, depth, open_parts = began + text.count(b"\n"), place + 1, 0, []
        if depth == 0:
            line = _checked_gap(path, line, part[at:])
        else:
            open_parts.append(part[at:])
            depth = int(depths[-1]) if len(depths) else depth
            if sum(map(len, open_parts)) > _LONGEST_BYTES:
                raise ValueError(
                    f"{path}: line {began} is malformed: more than {_LONGEST_BYTES >> 20} MiB without an end"
                )
    if depth or pending:
        raise ValueError(f"{path}: line {began} is truncated or malformed: its object has no end")


def _checked_gap(path: Path, line: int, gap: bytes) -> int:
    """The line after what stands between two objects."""
    if odd := gap.strip(_BETWEEN):
        line += gap[: gap.index(odd)].count(b"\n")
        raise ValueError(f"{path}: line {line} is truncated or malformed: {odd[:40].decode(errors='replace')!r}")
    return line + gap.count(b"\n")


def _parsed(path: Path, held: list[Record], schema: pa.Schema) -> pa.Table:
    longest = max(len(text) for _, text in held)
    try:
        table = pajson.read_json(
            pa.BufferReader(b"\n".join(text for _, text in held)),
            read_options=pajson.ReadOptions(block_size=max(_BLOCK_BYTES, longest + 2)),
            parse_options=pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(_first_bad(path, held, schema, str(error).splitlines()[0])) from error
    if len(table) != len(held):
        raise ValueError(_first_bad(path, held, schema, "objects that are none"))
    return table


def _first_bad(path: Path, held: list[Record], schema: pa.Schema, reason: str) -> str:
    """Which object it is; they are read one by one, which only an error message does."""
    whole = [field.name for field in schema if pa.types.is_integer(field.type)]
    lists = [field.name for field in schema if pa.types.is_list(field.type)]
    for line, text in held:
        try:
            record: dict[str, Any] = json.loads(text)
            for name in whole:
                if type(record.get(name, 0)) is not int:
                    return f"{path}: line {line}: {name} is no integer"
            for name in lists:
                if any(type(i) is not int for token in record.get(name, ()) for i in token):
                    return f"{path}: line {line}: {name} holds something that is no integer"
        except (ValueError, TypeError, RecursionError) as error:
            return f"{path}: line {line} is truncated or malformed: {error}"
    return f"{path}: {reason}"
