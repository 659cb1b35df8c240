"""Parquet with a list column `indices`, a row a token: K expert ids, best first, as in FLAME-MoE's traces.

FLAME-MoE has a folder for every training iteration with a file ``layer_NN.parquet`` for every layer: give the folder,
and layers are numbered by their files. A single file may instead have a column `layer` (integer); without, it is one
layer, numbered by its name where that has a number after ``layer_``, else 0.

Further columns are used where they are there:

    step    integer, the training step of a token's row; an iteration of the trace is then a step
    token   integer, number of the token in its layer (in its step and layer); rows are put in its order. Without it a
            layer's rows are taken in the order of the file, which is the order of tokens in FLAME-MoE.

All others, such as `scores`, are left out. Columns may have other usual names: `topk_ids`, `layer_id`, `iteration`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hiermoe.routing.column_names import find_columns
from hiermoe.routing.importers.recording import CHUNK_TOKENS, Recording, Source, first_true, from_lists

_INDICES, _LAYER, _STEP, _TOKEN = "indices", "layer", "step", "token"
_ORDER = "A token's experts are in the order of the list. Scores, where the file has them, were left out."


def recognized(path: Path) -> str | None:
    """What the file or folder is, in words; None where it is of another form."""
    files = sorted(path.glob("layer_*.parquet")) if path.is_dir() else [path]
    if not files:
        return None
    with files[0].open("rb") as file:
        starts = file.read(4) == b"PAR1"
    return f"Parquet of indices, {len(files)} of its files" if starts else None


def read(source: Source) -> Recording:
    """Read one file, or one file a layer.

    Raises:
        ValueError: truncated, columns that are missing or of another type, K that changes, layers of unequal length.
    """
    files = source.files("layer_*.parquet")
    rows: dict[int, list[np.ndarray]] = {}
    keys: dict[int, list[np.ndarray]] = {}  # step and token of each row, where the file has them
    origin: dict[int, list[tuple[Path, np.ndarray | int]]] = {}
    named = _layer_files(source, files)
    for path, file_layer in named:
        for start, layer_rows, keys_R2, ids_RK in _parts(path, source):
            layers = np.full(len(ids_RK), file_layer) if layer_rows is None else layer_rows
            for layer in np.unique(layers).tolist():
                if not source.wants(layer):
                    rows.setdefault(layer, [])
                    continue
                mask = layers == layer
                whole = bool(mask.all())
                rows.setdefault(layer, []).append(ids_RK if whole else ids_RK[mask])
                keys.setdefault(layer, []).append(keys_R2 if whole else keys_R2[mask])
                origin.setdefault(layer, []).append((path, start if whole else start + np.flatnonzero(mask)))
    kept = source.kept(rows)
    if not kept:
        raise ValueError(f"{source.path}: it has no tokens")

    def where(layer: int, row: int) -> str:
        for (path, at), part in zip(origin[layer], rows[layer], strict=True):
            if row < len(part):
                return f"{path}: row {at + row if isinstance(at, int) else int(at[row])}, layer {layer}"
            row -= len(part)
        raise IndexError(row)

    lengths = {layer: sum(map(len, rows[layer])) for layer in kept}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{source.path}: layers have unequal numbers of tokens: {lengths}")
    widths = {part.shape[1] for layer in kept for part in rows[layer]}
    if len(widths) > 1:
        raise ValueError(f"{source.path}: files have unequal K: {sorted(widths)}")
    return _ordered(source, kept, rows, keys, where, tuple(path for path, _ in named))


def _layer_files(source: Source, files: list[Path]) -> list[tuple[Path, int]]:
    """Files with the layers that their names say; in a folder only those that are wanted."""
    numbers = [int(found[1]) if (found := re.search(r"layer_?(\d+)", path.name)) else 0 for path in files]
    if not source.path.is_dir():
        return list(zip(files, numbers, strict=True))
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{source.path}: two files are named for one layer")
    wanted = source.kept(numbers)
    return [(path, number) for path, number in zip(files, numbers, strict=True) if number in wanted]


def _parts(path: Path, source: Source) -> Iterator[tuple[int, np.ndarray | None, np.ndarray, np.ndarray]]:
    """Parts of a file: first row, layer of every row (None: the file's), [step, token], ids."""
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: it is truncated or no Parquet file: {str(error).splitlines()[0]}") from error
    names = file.schema_arrow.names
    places = find_columns(path, names, (), (_INDICES, _LAYER, _STEP, _TOKEN))
    named = {thing: names[place] for thing, place in places.items()}
    if _INDICES not in named:
        raise ValueError(f"{path}: no column {_INDICES}; it has {sorted(names)}")
    kind = file.schema_arrow.field(named[_INDICES]).type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not pa.types.is_integer(kind.value_type):
        raise ValueError(f"{path}: column {_INDICES} is {kind}; the rule is a list of integers")
    for name in (named[thing] for thing in (_LAYER, _STEP, _TOKEN) if thing in named):
        if not pa.types.is_integer(file.schema_arrow.field(name).type):
            raise ValueError(f"{path}: column {name} is {file.schema_arrow.field(name).type}; the rule is an integer")
    # Where rows are already the tokens of one layer in order, the rest need not be read.
    limit = source.max_tokens if list(named) == [_INDICES] and source.max_tokens else file.metadata.num_rows
    topk, start = source.topk, 0
    try:
        for batch in file.iter_batches(batch_size=CHUNK_TOKENS, columns=list(named.values())):
            batch = batch.slice(0, limit - start)
            ids_RK = from_lists(batch.column(named[_INDICES]), topk, lambda row, at=start: f"{path}: row {at + row}")
            topk = ids_RK.shape[1]
            others = {}
            for thing in [thing for thing in named if thing != _INDICES]:
                column = batch.column(named[thing])
                if column.null_count:
                    raise ValueError(f"{path}: row {start + first_true(column.is_null())} has no {named[thing]}")
                others[thing] = column.to_numpy(zero_copy_only=False).astype(np.int64)
            zeros = np.zeros(len(ids_RK), np.int64)
            keys_R2 = np.stack([others.get(_STEP, zeros), others.get(_TOKEN, zeros - 1)], axis=1)
            yield start, others.get(_LAYER), keys_R2, ids_RK
            start += len(ids_RK)
            if start == limit:
                return
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: damaged after row {start}: {str(error).splitlines()[0]}") from error


def _ordered(
    source: Source,
    kept: list[int],
    rows: Mapping[int, list[np.ndarray]],
    keys: Mapping[int, list[np.ndarray]],
    where: Callable[[int, int], str],
    files: tuple[Path, ...],
) -> Recording:
    """Rows of every layer in the order of step and token; the same steps and tokens in every layer."""
    orders: dict[int, np.ndarray] = {}
    first: np.ndarray | None = None
    for layer in kept:
        keys_N2 = np.concatenate(keys[layer])
        numbered = bool((keys_N2[:, 1] >= 0).all())
        order = np.lexsort((keys_N2[:, 1], keys_N2[:, 0])) if numbered else np.argsort(keys_N2[:, 0], kind="stable")
        sorted_N2 = keys_N2[order]
        if numbered and (repeated := (np.diff(sorted_N2, axis=0) == 0).all(axis=1)).any():
            row = int(order[int(np.argmax(repeated)) + 1])
            raise ValueError(f"{where(layer, row)}: its step and token are there twice")
        if first is None:
            first = sorted_N2
        elif not np.array_equal(first, sorted_N2):
            raise ValueError(f"{source.path}: layers {kept[0]} and {layer} do not have the same steps and tokens")
        orders[layer] = order
    assert first is not None
    steps, counts = np.unique(first[:, 0], return_counts=True)
    ids, several = {}, len(steps) > 1
    count = len(first) if several else min(len(first), source.max_tokens or len(first))
    for layer in kept:
        order = orders.pop(layer)
        joined = np.concatenate(rows[layer])
        rising = bool((np.diff(order) == 1).all())
        ids[layer] = joined[:count] if rising else joined[order[:count]]
        orders[layer] = order
    num_tokens = None
    if several:
        ranks = source.ranks or 1
        if (odd := counts[counts % ranks != 0]).size:
            raise ValueError(f"{source.path}: {odd[0]} tokens of a step do not divide over ranks={ranks}")
        num_tokens = np.repeat(counts[:, None] // ranks, ranks, axis=1)
    return Recording(
        ids,
        files,
        lambda layer, row: where(layer, int(orders[layer][row])),
        _ORDER,
        num_tokens,
        tuple(steps.tolist()) if several else None,
    )
