"""Megatron-LM's router trace, .jsonl: {step, layer, rank, num_tokens, topk, top_indices} a line, a file a rank.

A line is what one rank's router of one layer chose in one forward: ``top_indices`` is a list of ``num_tokens`` lists of
``topk`` expert ids. Give one file, or the folder of all ranks' files (``*.jsonl``, packed or not). The objects may as
well be pretty-printed or lie in one array. Further keys are ignored, but lines whose ``block`` is another than
"decoder" (multi-token prediction numbers its layers from 0 again) are left out, and the import says how many. Several
lines of one step, layer and rank, as gradient accumulation gives them, are joined in the order of the file. A rank
without lines in a step holds no tokens there.

Megatron-LM counts layers within a stage of a pipeline, and within a chunk of the model where a stage has several: in
the files, ranks of other stages look like ranks with other tokens, and chunks like micro-batches (see `pipeline`).
Where files can be either, the import asks. Lines with ``"numbering": "model"``, as RankTrace of this project writes
them, number layers through the whole model.

A rank is a rank of the whole job. Where tensor parallelism gives several ranks the same tokens, give the files of one
of them; with activation recomputation the hook that writes these lines runs twice a step, which no file shows.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hiermoe.routing.importers.json_records import batches
from hiermoe.routing.importers.pipeline import Forwards, Line, numbered_through
from hiermoe.routing.importers.recording import Recording, Source, from_lists
from hiermoe.routing.text_file import beginning

_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("layer", pa.int64()),
        ("rank", pa.int64()),
        ("num_tokens", pa.int64()),
        ("topk", pa.int64()),
        ("top_indices", pa.list_(pa.list_(pa.int32()))),
        ("block", pa.string()),
        ("numbering", pa.string()),
    ]
)
_NEEDED = ("step", "layer", "rank", "num_tokens", "topk", "top_indices")


def recognized(path: Path) -> str | None:
    """What the file or folder is, in words; None where it is of another form."""
    files = sorted({*path.glob("*.jsonl"), *path.glob("*.jsonl.*")}) if path.is_dir() else [path]
    if not files or b'"top_indices"' not in beginning(files[0]):
        return None
    return f"Megatron-LM's router trace, {len(files)} of its files"


def read(source: Source) -> Recording:
    """Read all lines.

    Raises:
        ValueError: a line is no JSON, lacks a key or has lists of another length than it says; a layer is missing in
            some step and rank; K changes; or it is not known what the ranks and lines are of a pipeline.
    """
    files = _once_each(source.files("*.jsonl", "*.jsonl.*"))
    forwards: Forwards = {}
    topk, others, through_model = source.topk, 0, True
    for path in files:
        before = sum(map(len, forwards.values())) + others
        for place, record in _records(path):
            if record["block"] not in (None, "decoder"):
                others += 1
                continue
            ids_TK = _ids(place, record)
            topk = topk or ids_TK.shape[1]
            if ids_TK.shape[1] != topk:
                raise ValueError(f"{place} has {ids_TK.shape[1]} experts a token, not K={topk}")
            through_model &= record["numbering"] == "model"
            if (source.pipeline or 1) == 1 and not source.wants(record["layer"]):
                ids_TK = ids_TK[:0].copy()  # only that it is there counts
            line = Line(record["layer"], ids_TK, place)
            forwards.setdefault((record["step"], record["rank"]), []).append(line)
        if sum(map(len, forwards.values())) + others == before:
            raise ValueError(f"{path}: it has no lines")
    if not forwards:
        raise ValueError(f"{source.path}: it has no lines of the decoder's layers")
    pieces, notes = numbered_through(source, forwards, through_model)
    del forwards  # ``pieces`` alone holds the lines from here on, a layer less at a time
    kept = source.kept(pieces)
    pieces = {layer: pieces[layer] for layer in kept}
    num_tokens, steps, order = _grid(source, pieces)
    missing = len(order) - len({key for of_layer in pieces.values() for key in of_layer})
    ids, lengths = {}, {}
    for layer in kept:
        of_layer = pieces.pop(layer)  # once they are joined, what is needed of the pieces is where they came from
        ordered = [line for key in order for line in of_layer.get(key, ())]
        ids[layer] = np.concatenate([line.ids_TK for line in ordered])
        lengths[layer] = [(len(line.ids_TK), line.place) for line in ordered]

    def where(layer: int, row: int) -> str:
        for length, place in lengths[layer]:
            if row < length:
                return f"{place}, token {row} (layer {layer})"
            row -= length
        raise IndexError(row)

    left_out = [f"{others} lines of other blocks than the decoder"] if others else []
    if missing:
        left_out.append(f"{missing} of {len(order)} pairs of step and rank, which have no lines and hold no tokens")
    notes = f"The file does not say whether a token's experts are ordered by score. {notes}".strip()
    return Recording(ids, tuple(files), where, notes, num_tokens, steps, tuple(left_out))


def _once_each(files: list[Path]) -> list[Path]:
    """The files; one that is there packed and unpacked would double its rank's tokens."""
    seen: dict[str, Path] = {}
    for path in files:
        same = seen.setdefault(path.name.partition(".jsonl")[0], path)
        if same is not path:
            raise ValueError(f"{path.parent}: {same.name} and {path.name} are of one rank; leave one of them")
    return files


def _grid(source: Source, pieces: dict[int, Forwards]) -> tuple[np.ndarray, tuple[int, ...], list[tuple[int, int]]]:
    """Tokens of every step and rank, the steps, and the keys in their order; every layer must have the same ones."""
    there = {key for of_layer in pieces.values() for key in of_layer}
    steps, ranks = sorted({step for step, _ in there}), sorted({rank for _, rank in there})
    order = [(step, rank) for step in steps for rank in ranks]
    num_tokens = np.zeros((len(steps), len(ranks)), np.int64)
    first = next(iter(pieces))
    for layer, of_layer in pieces.items():
        for number, key in enumerate(order):
            if key not in there:
                continue
            if key not in of_layer:
                raise ValueError(f"{source.path}: layer {layer} is missing in step {key[0]} of rank {key[1]}")
            count, at = sum(len(line.ids_TK) for line in of_layer[key]), np.unravel_index(number, num_tokens.shape)
            if layer == first:
                num_tokens[at] = count
            elif count != num_tokens[at]:
                raise ValueError(
                    f"{of_layer[key][0].place}: layer {layer} has {count} tokens in step {key[0]} of rank {key[1]}, "
                    f"another layer has {num_tokens[at]}"
                )
    return num_tokens, tuple(steps), order


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object, what it is called, and what it holds; ``top_indices`` stays an Arrow array."""
    scalar = [name for name in _SCHEMA.names if name != "top_indices"]
    for lines, table in batches(path, _SCHEMA):
        lists = [each for chunk in table.column("top_indices").chunks for each in chunk]
        for line, record, indices in zip(lines, table.select(scalar).to_pylist(), lists, strict=True):
            yield f"{path}: line {line}", record | {"top_indices": indices}


def _ids(place: str, record: dict[str, Any]) -> np.ndarray:
    """``top_indices`` of a record as uint16 [T, K], checked against what the record says."""
    lacking = [name for name in _NEEDED if record[name] is None]
    if lacking or not record["top_indices"].is_valid:
        raise ValueError(f"{place} has no {', '.join(lacking) or 'top_indices'}")
    tokens = record["top_indices"].values
    if len(tokens) != record["num_tokens"] or record["topk"] < 1:
        raise ValueError(f"{place} has {len(tokens)} tokens, num_tokens={record['num_tokens']}, topk={record['topk']}")
    return from_lists(tokens, record["topk"], lambda token: f"{place}, token {token}")
