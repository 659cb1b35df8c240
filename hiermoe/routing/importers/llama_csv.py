"""CSV of `layer,expert`, K rows a token, as llama.cpp's moe-trace example writes it.

A row is one routed activation: one expert that one token chose in one layer. Tokens have no number, so they are
recovered by counting: the rows of a layer, taken by themselves and in the order of the file, are K to a token, best
expert first. That holds for moe-trace, which writes a layer's whole tensor [tokens, K] at once, token after token. K is
not in the file: give it. A header line ``layer,expert`` may be there. Layers are numbered as in the file, from 0.

llama.cpp computes only the tokens whose output is wanted in its last layer, so that has fewer; leave it out by layers.
"""

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from hiermoe.routing.importers.recording import Recording, Source, narrowed

_BLOCK_BYTES = 2**26
_HEADER = re.compile(rb'\s*"?layer"?\s*,\s*"?expert"?\s*\r?\n', re.IGNORECASE)
_BAD_LINE = re.compile(rb"^(?![ \t]*-?\d+[ \t]*,[ \t]*-?\d+[ \t]*\r?$).*$", re.MULTILINE)


def read(source: Source) -> Recording:
    """Read the file, a block at a time.

    Raises:
        ValueError: K was not given, a line is no pair of integers, the last line has no end, a layer's rows are no
            multiple of K, or layers have unequal numbers of tokens.
    """
    path = source.path
    if source.topk is None:
        raise ValueError(f"{path}: the format does not say how many experts a token has; give --topk K")
    header = _check_ends(path)
    experts: dict[int, list[np.ndarray]] = {}
    first_line = 1 + header
    for layer_R, expert_R in _blocks(path, header):
        for layer in np.unique(layer_R).tolist():
            mask = layer_R == layer
            if not source.wants(layer):
                experts.setdefault(layer, [])
                continue

            def where_row(row: int, mask: np.ndarray = mask, at: int = first_line) -> str:
                return f"{path}: line {at + int(np.flatnonzero(mask)[row])}"

            part = narrowed(expert_R[mask][:, None], where_row)[:, 0]
            experts.setdefault(layer, []).append(part)
        first_line += len(layer_R)
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
        return f"{path}: line {_line_of(path, header, layer, row * (source.topk or 1))}, token {row} of layer {layer}"

    notes = f"Tokens were recovered by counting: K={source.topk} rows of a layer in a row are one."
    return Recording(ids, (path,), where, notes)


def _check_ends(path: Path) -> bool:
    """Refuse a file whose last line is cut; say whether the first line is a header."""
    if path.is_dir() or path.stat().st_size == 0:
        raise ValueError(f"{path}: it is empty or a folder")
    with path.open("rb") as file:
        header = _HEADER.match(file.readline()) is not None
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            raise ValueError(f"{path}: the last line has no end: it is truncated")
    return header


def _blocks(path: Path, header: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Layers and experts of all rows, block after block."""
    try:
        reader = pacsv.open_csv(
            path,
            read_options=pacsv.ReadOptions(
                block_size=_BLOCK_BYTES, column_names=[*"le"], skip_rows=int(header), use_threads=True
            ),
            parse_options=pacsv.ParseOptions(quote_char=False, ignore_empty_lines=False),
            convert_options=pacsv.ConvertOptions(column_types={"l": pa.int32(), "e": pa.int32()}, null_values=[]),
        )
        for batch in reader:
            yield batch.column(0).to_numpy(), batch.column(1).to_numpy()
    except pa.ArrowInvalid as error:
        raise ValueError(_first_bad_line(path, header, str(error).splitlines()[0])) from error


def _first_bad_line(path: Path, header: bool, reason: str) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(b"\n") + 1 if header else 0
        bad = _BAD_LINE.search(content, start)
        if bad is None or bad.start() == len(content):
            return f"{path}: {reason}"
        line = content[: bad.start()].count(b"\n") + 1
        return f"{path}: line {line} is {bad[0][:40].decode(errors='replace')!r}, not layer,expert"


def _line_of(path: Path, header: bool, layer: int, index: int) -> int:
    """Line of a layer's row; reads the file once more, which only an error message does."""
    at = 1 + header
    for layer_R, _ in _blocks(path, header):
        mine = np.flatnonzero(layer_R == layer)
        if index < len(mine):
            return at + int(mine[index])
        index -= len(mine)
        at += len(layer_R)
    raise IndexError(index)
