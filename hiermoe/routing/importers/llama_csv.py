"""CSV of `layer,expert`, K rows a token, as llama.cpp's moe-trace example writes it.

A row is one routed activation: one expert that one token chose in one layer. Tokens have no number, so they are
recovered by counting: the rows of a layer, taken by themselves and in the order of the file, are K to a token, best
expert first. That holds for moe-trace, which writes a layer's whole tensor [tokens, K] at once, token after token. K is
not in the file: give it. A header ``layer,expert`` may be there, also where files that have one were merged; it says
which column is which, and with which separator. Layers are numbered as in the file, from 0.

llama.cpp computes only the tokens whose output is wanted in its last layer, so that has fewer; leave it out by layers.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from hiermoe.routing.column_names import find_columns
from hiermoe.routing.importers.recording import Recording, Source, narrowed
from hiermoe.routing.text_file import beginning, line_blocks

_NEEDED = ("layer", "expert")


@dataclass(frozen=True)
class _Form:
    """How rows are written: the separator, and whether the layer stands first."""

    separator: bytes = b","
    layer_first: bool = True

    @property
    def bad_line(self) -> re.Pattern[bytes]:
        """A line that is no row."""
        whole = rb"[ \t]*-?\d+[ \t]*"
        return re.compile(rb"^(?!" + whole + self.separator + whole + rb"\r?$).*$", re.MULTILINE)


def recognized(path: Path) -> str | None:
    """What the file is, in words; None where it is of another form."""
    start = b"" if path.is_dir() else beginning(path)
    first, _, rest = start.partition(b"\n")
    if rest and re.search(rb"[A-Za-z]", first):
        try:
            form = _form(path, 1, first)
        except ValueError:
            return None
        first = rest.partition(b"\n")[0]
    else:
        form = _Form(next((mark for mark in (b";", b"\t") if mark in first), b","))
    whole = first and not form.bad_line.search(first)
    return "rows of layer and expert, as llama.cpp's moe-trace writes them" if whole else None


def read(source: Source) -> Recording:
    """Read the file, a block at a time.

    Raises:
        ValueError: K was not given, a line is no pair of integers, the last line has no end, a layer's rows are no
            multiple of K, or layers have unequal numbers of tokens.
    """
    path = source.path
    if source.topk is None:
        raise ValueError(f"{path}: the format does not say how many experts a token has; give --topk K")
    experts: dict[int, list[np.ndarray]] = {}
    for first_line, layer_R, expert_R in _blocks(path):
        for layer in np.unique(layer_R).tolist():
            mask = layer_R == layer
            if not source.wants(layer):
                experts.setdefault(layer, [])
                continue

            def where_row(row: int, mask: np.ndarray = mask, at: int = first_line) -> str:
                return f"{path}: line {at + int(np.flatnonzero(mask)[row])}"

            part = narrowed(expert_R[mask][:, None], where_row)[:, 0]
            experts.setdefault(layer, []).append(part)
    ids = {}
    for layer in source.kept(experts):
        joined = np.concatenate(experts.pop(layer))
        if len(joined) % source.topk:
            raise ValueError(
                f"{path}: layer {layer} has {len(joined)} rows, no multiple of topk={source.topk}: it is truncated, or "
                "K is another one"
            )
        ids[layer] = joined.reshape(-1, source.topk)
    lengths = {layer: len(rows) for layer, rows in ids.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{path}: layers have unequal numbers of tokens: {lengths}; llama.cpp's last layer has fewer, leave it out "
            "by --layers"
        )
    if source.max_tokens is not None:
        ids = {layer: rows[: source.max_tokens] for layer, rows in ids.items()}

    def where(layer: int, row: int) -> str:
        return f"{path}: line {_line_of(path, layer, row * (source.topk or 1))}, token {row} of layer {layer}"

    notes = f"Tokens were recovered by counting: K={source.topk} rows of a layer in a row are one."
    return Recording(ids, (path,), where, notes)


def _blocks(path: Path) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Rows that follow each other: line of the first, layers and experts."""
    form, block = _Form(), b""
    for first_line, block in line_blocks(path):
        at, line = 0, first_line
        # Numbers and their separators are below any letter: what is not is in a header, or in what is no row.
        for odd in np.flatnonzero(np.frombuffer(block, np.uint8) >= ord("A")).tolist():
            if odd < at:
                continue
            start, end = block.rfind(b"\n", at, odd) + 1 or at, block.find(b"\n", odd) + 1 or len(block)
            if start > at:
                yield line, *_parsed(path, block[at:start], line, form)
                line += block.count(b"\n", at, start)
            form, at, line = _form(path, line, block[start:end]), end, line + 1
        if first_line == 1 and at == 0:
            form = _Form(next((mark for mark in (b";", b"\t") if mark in block[: block.find(b"\n")]), b","))
        if at < len(block):
            yield line, *_parsed(path, block[at:], line, form)
    if not block:
        raise ValueError(f"{path}: it is empty")
    if not block.endswith(b"\n"):
        raise ValueError(f"{path}: the last line has no end: it is truncated")


def _form(path: Path, line: int, text: bytes) -> _Form:
    """What a header says."""
    shown = text.strip()[:40].decode(errors="replace")
    separator = next((mark for mark in (b";", b"\t") if mark in text), b",")
    names = text.decode(errors="replace").strip().replace('"', "").split(separator.decode())
    try:
        places = find_columns(f"{path}: line {line}", names, _NEEDED)
    except ValueError:
        places = {}
    if len(names) != len(_NEEDED) or not places:
        raise ValueError(f"{path}: line {line} is {shown!r}, not layer,expert")
    return _Form(separator, places["layer"] == 0)


def _parsed(path: Path, rows: bytes, line: int, form: _Form) -> tuple[np.ndarray, np.ndarray]:
    """Layers and experts of rows, the first of which is a line of the file."""
    try:
        table = pacsv.read_csv(
            pa.BufferReader(rows),
            read_options=pacsv.ReadOptions(block_size=2**24, column_names=[*"ab"]),
            parse_options=pacsv.ParseOptions(
                delimiter=form.separator.decode(), quote_char=False, ignore_empty_lines=False
            ),
            convert_options=pacsv.ConvertOptions(column_types={"a": pa.int32(), "b": pa.int32()}, null_values=[]),
        )
    except pa.ArrowInvalid as error:
        bad = form.bad_line.search(rows)
        if bad is None or bad.start() == len(rows):
            raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
        line += rows[: bad.start()].count(b"\n")
        shown = bad[0][:40].decode(errors="replace")
        raise ValueError(f"{path}: line {line} is {shown!r}, not layer,expert") from error
    first, second = table.column(0).to_numpy(), table.column(1).to_numpy()
    return (first, second) if form.layer_first else (second, first)


def _line_of(path: Path, layer: int, index: int) -> int:
    """Line of a layer's row; reads the file once more, which only an error message does."""
    for first_line, layer_R, _ in _blocks(path):
        mine = np.flatnonzero(layer_R == layer)
        if index < len(mine):
            return first_line + int(mine[index])
        index -= len(mine)
    raise IndexError(index)
