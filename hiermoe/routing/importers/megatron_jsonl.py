"""Megatron-LM's router trace, .jsonl: {step, layer, rank, num_tokens, topk, top_indices} a line, a file a rank.

A line is what one rank's router of one layer chose in one forward: ``top_indices`` is a list of ``num_tokens`` lists of
``topk`` expert ids. Give one file, or the folder of all ranks' files (``*.jsonl``). Further keys are ignored, but lines
whose ``block`` is another than "decoder" (multi-token prediction numbers its layers from 0 again) are left out, and the
trace says how many. Several lines of one step, layer and rank, as gradient accumulation gives them, are joined in the
order of the file. Layers are numbered as in the file.

A rank is a rank of the whole job. Where tensor parallelism gives several ranks the same tokens, give the files of one
of them; with activation recomputation the hook that writes these lines runs twice a step, which no file shows.
"""

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pajson

from hiermoe.routing.importers.recording import Recording, Source, from_lists

_BLOCK_BYTES = 2**25  # at least; a block holds the longest line
_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("layer", pa.int64()),
        ("rank", pa.int64()),
        ("num_tokens", pa.int64()),
        ("topk", pa.int64()),
        ("top_indices", pa.list_(pa.list_(pa.int32()))),
        ("block", pa.string()),
    ]
)
_NEEDED = ("step", "layer", "rank", "num_tokens", "topk", "top_indices")

Piece = tuple[np.ndarray, str]  # expert ids [T, K] of a line, and which line it is


def read(source: Source) -> Recording:
    """Read all lines.

    Raises:
        ValueError: a line is no JSON, lacks a key or has lists of another length than it says; a layer is missing in
            some step and rank; K changes.
    """
    files = source.files("*.jsonl")
    pieces: dict[int, dict[tuple[int, int], list[Piece]]] = {}
    topk, left_out = source.topk, 0
    for path in files:
        for line, record in _records(path):
            if record["block"] not in (None, "decoder"):
                left_out += 1
                continue
            layer = record["layer"]
            of_layer = pieces.setdefault(layer, {})
            if not source.wants(layer):
                continue
            ids_TK = _ids(line, record)
            topk = topk or ids_TK.shape[1]
            if ids_TK.shape[1] != topk:
                raise ValueError(f"{line} has {ids_TK.shape[1]} experts a token, not K={topk}")
            of_layer.setdefault((record["step"], record["rank"]), []).append((ids_TK, line))
    kept = source.kept(pieces)
    if not kept:
        raise ValueError(f"{source.path}: it has no lines of the decoder's layers")
    num_tokens, steps, order = _grid(source, {layer: pieces[layer] for layer in kept})
    ids, lengths = {}, {}
    for layer in kept:
        of_layer = pieces.pop(layer)  # once they are joined, what is needed of the pieces is where they came from
        ordered = [piece for key in order for piece in of_layer[key]]
        ids[layer] = np.concatenate([rows for rows, _ in ordered])
        lengths[layer] = [(len(rows), line) for rows, line in ordered]

    def where(layer: int, row: int) -> str:
        for length, line in lengths[layer]:
            if row < length:
                return f"{line}, token {row} (layer {layer})"
            row -= length
        raise IndexError(row)

    notes = "The file does not say whether a token's experts are ordered by score."
    if left_out:
        notes += f" {left_out} lines of other blocks than the decoder were left out."
    return Recording(ids, tuple(files), where, notes, num_tokens, steps)


def _grid(
    source: Source, pieces: dict[int, dict[tuple[int, int], list[Piece]]]
) -> tuple[np.ndarray, tuple[int, ...], list[tuple[int, int]]]:
    """Tokens of every step and rank, the steps, and the keys in their order; every layer must have all of them."""
    keys = sorted({key for of_layer in pieces.values() for key in of_layer})
    steps, ranks = sorted({step for step, _ in keys}), sorted({rank for _, rank in keys})
    order = [(step, rank) for step in steps for rank in ranks]
    num_tokens = np.zeros((len(steps), len(ranks)), np.int64)
    for layer, of_layer in pieces.items():
        for number, key in enumerate(order):
            if key not in of_layer:
                raise ValueError(f"{source.path}: layer {layer} is missing in step {key[0]} of rank {key[1]}")
            count, at = sum(len(piece[0]) for piece in of_layer[key]), np.unravel_index(number, num_tokens.shape)
            if layer == next(iter(pieces)):
                num_tokens[at] = count
            elif count != num_tokens[at]:
                raise ValueError(
                    f"{of_layer[key][0][1]}: layer {layer} has {count} tokens in step {key[0]} of rank {key[1]}, "
                    f"another layer has {num_tokens[at]}"
                )
    return num_tokens, tuple(steps), order


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line that is not blank, what it is called, and its record; ``top_indices`` stays an Arrow array."""
    numbers, longest = _lines(path)
    if not len(numbers):
        raise ValueError(f"{path}: it has no lines")
    try:
        reader = pajson.open_json(
            path,
            read_options=pajson.ReadOptions(block_size=max(_BLOCK_BYTES, longest + 2)),
            parse_options=pajson.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore"),
        )
        row = 0
        for batch in reader:
            scalars = batch.select([name for name in _SCHEMA.names if name != "top_indices"]).to_pylist()
            lists = batch.column("top_indices")
            for i, record in enumerate(scalars):
                yield f"{path}: line {numbers[row]}", record | {"top_indices": lists[i]}
                row += 1
    except pa.ArrowInvalid as error:
        raise ValueError(_first_bad_line(path, str(error).splitlines()[0])) from error


def _ids(line: str, record: dict[str, Any]) -> np.ndarray:
    """``top_indices`` of a record as uint16 [T, K], checked against what the record says."""
    lacking = [name for name in _NEEDED if record[name] is None]
    if lacking or not record["top_indices"].is_valid:
        raise ValueError(f"{line} has no {', '.join(lacking) or 'top_indices'}")
    tokens = record["top_indices"].values
    if len(tokens) != record["num_tokens"] or record["topk"] < 1:
        raise ValueError(f"{line} has {len(tokens)} tokens, num_tokens={record['num_tokens']}, topk={record['topk']}")
    return from_lists(tokens, record["topk"], lambda token: f"{line}, token {token}")


def _lines(path: Path) -> tuple[np.ndarray, int]:
    """Numbers, from 1, of the lines that are not blank, and the length of the longest line in bytes."""
    if path.stat().st_size == 0:
        return np.zeros(0, np.int64), 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        ends, at = [-1], content.find(b"\n")
        while at >= 0:
            ends.append(at)
            at = content.find(b"\n", at + 1)
        if ends[-1] != len(content) - 1:
            ends.append(len(content))
        lengths = np.diff(ends) - 1
        short = np.flatnonzero(lengths < 16)
        blank = [i for i in short.tolist() if not content[ends[i] + 1 : ends[i + 1]].strip()]
    numbers = np.delete(np.arange(1, len(lengths) + 1), blank)
    return numbers, int(lengths.max(initial=0))


def _first_bad_line(path: Path, reason: str) -> str:
    """Which line it is; lines are read one by one, which only an error message does."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                for name in ("step", "layer", "rank", "num_tokens", "topk"):
                    if type(record[name]) is not int:
                        return f"{path}: line {number}: {name} is no integer"
                if any(type(i) is not int for token in record["top_indices"] for i in token):
                    return f"{path}: line {number}: top_indices holds something that is no integer"
            except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                return f"{path}: line {number} is truncated or malformed: {error}"
    return f"{path}: {reason}"
