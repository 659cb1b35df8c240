"""How fast routing of others is read, against a loop over tokens. 10^6 tokens, K = 8, E = 256, one layer.

The loop reads what its format's own tutorial would: csv, json, Parquet rows, array rows; it works on a tenth of the
tokens and is extrapolated. It makes the same checks: ids in range, none twice.
"""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from time import process_time

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from hiermoe.routing.importers import IMPORTERS
from hiermoe.routing.importers.as_trace import to_trace
from hiermoe.routing.importers.recording import Source
from tests.benchmarks.conftest import Measure

TOKENS, SAMPLE, TOPK, EXPERTS, LINE = 10**6, 10**5, 8, 256, 8192

pytestmark = pytest.mark.benchmark(timer=process_time)


def routing(tokens: int) -> np.ndarray:
    """Distinct experts by an odd stride from a random start, int16 [N, K]."""
    generator = np.random.default_rng(0)
    start_N1 = generator.integers(0, EXPERTS, (tokens, 1))
    stride_N1 = 2 * generator.integers(0, EXPERTS // 2, (tokens, 1)) + 1
    return ((start_N1 + stride_N1 * np.arange(TOPK)) % EXPERTS).astype(np.int16)


def write_npy(path: Path, ids_NK: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, ids_NK[:, None])


def write_parquet(path: Path, ids_NK: np.ndarray) -> None:
    offsets = np.arange(0, ids_NK.size + 1, TOPK, dtype=np.int32)
    pq.write_table(pa.table({"indices": pa.ListArray.from_arrays(offsets, ids_NK.ravel())}), path)


def write_csv(path: Path, ids_NK: np.ndarray) -> None:
    table = pa.table({"layer": np.zeros(ids_NK.size, np.int16), "expert": ids_NK.ravel()})
    pacsv.write_csv(table, path, pacsv.WriteOptions(quoting_style="none"))


def write_jsonl(path: Path, ids_NK: np.ndarray) -> None:
    with path.open("w") as file:
        for step, at in enumerate(range(0, len(ids_NK), LINE)):
            part = ids_NK[at : at + LINE].tolist()
            line = {"step": step, "layer": 0, "rank": 0, "num_tokens": len(part), "topk": TOPK, "top_indices": part}
            file.write(json.dumps(line) + "\n")


def loop_npy(path: Path) -> Iterable[list[int]]:
    for token in np.load(path):
        yield [int(expert) for expert in token[0]]


def loop_parquet(path: Path) -> Iterable[list[int]]:
    for batch in pq.ParquetFile(path).iter_batches():
        for row in batch.column(0):
            yield row.as_py()


def loop_csv(path: Path) -> Iterable[list[int]]:
    with path.open() as file:
        rows = csv.reader(file)
        next(rows)
        token: list[int] = []
        for _, expert in rows:
            token.append(int(expert))
            if len(token) == TOPK:
                yield token
                token = []


def loop_jsonl(path: Path) -> Iterable[list[int]]:
    with path.open() as file:
        for line in file:
            yield from json.loads(line)["top_indices"]


def looped(tokens: Iterable[list[int]]) -> np.ndarray:
    """Check and collect tokens one by one."""
    kept = []
    for token in tokens:
        if len(set(token)) != TOPK or not all(0 <= expert < EXPERTS for expert in token):
            raise ValueError(token)
        kept.append(token)
    return np.array(kept, np.uint8)


@pytest.mark.parametrize(
    ("name", "write", "loop"),
    [
        ("npy", write_npy, loop_npy),
        ("parquet", write_parquet, loop_parquet),
        ("llama-csv", write_csv, loop_csv),
        ("megatron", write_jsonl, loop_jsonl),
    ],
)
def test_import(
    name: str,
    write: Callable[[Path, np.ndarray], None],
    loop: Callable[[Path], Iterable[list[int]]],
    measure: Measure,
    tmp_path: Path,
) -> None:
    ids_NK = routing(TOKENS)
    whole, part = tmp_path / "whole", tmp_path / "part"
    write(whole, ids_NK)
    write(part, ids_NK[:SAMPLE])

    def imported(path: Path) -> np.ndarray:
        source = Source(path, topk=TOPK)
        trace = to_trace(IMPORTERS[name].read(source), source, name, "any", EXPERTS, "benchmark")
        filled = np.arange(trace.expert_ids.shape[3]) < trace.num_tokens[..., None]
        return trace.expert_ids[:, 0][filled]

    np.testing.assert_array_equal(imported(part), looped(loop(part)))
    measure(
        f"import {name}, {TOKENS:.0e} tokens",
        lambda: imported(whole),
        f"loop over {SAMPLE:.0e} tokens x {TOKENS // SAMPLE}",
        lambda: looped(loop(part)),
        times=TOKENS / SAMPLE,
        note=f"the loop is extrapolated from {SAMPLE} tokens",
        rounds=3,
    )
