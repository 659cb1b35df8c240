"""Routing written in the form of each importer."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Ids = np.ndarray  # [layer, N, K]


def some_ids(layers: int = 2, tokens: int = 12, topk: int = 3, num_experts: int = 16, seed: int = 0) -> Ids:
    """Random routing without an expert twice, int64 [layer, N, K]."""
    scores = np.random.default_rng(seed).random((layers, tokens, num_experts))
    return np.argsort(scores, axis=-1)[..., :topk]


def write_npy(path: Path, ids_LNK: Ids) -> Path:
    np.save(path, ids_LNK.transpose(1, 0, 2).astype(np.int16))
    return path


def write_llama(path: Path, ids_LNK: Ids, header: bool = True, ubatch: int = 5) -> Path:
    """Layer after layer of a few tokens at a time, as llama.cpp computes them."""
    lines = ["layer,expert\n"] if header else []
    for start in range(0, ids_LNK.shape[1], ubatch):
        for layer, ids_NK in enumerate(ids_LNK):
            lines += [f"{layer},{expert}\n" for expert in ids_NK[start : start + ubatch].ravel()]
    path.write_text("".join(lines))
    return path


def write_flame(folder: Path, ids_LNK: Ids, first_layer: int = 2) -> Path:
    """FLAME-MoE's form: a file a layer, scores beside the indices."""
    folder.mkdir(exist_ok=True)
    for layer, ids_NK in enumerate(ids_LNK, first_layer):
        indices = pa.array(ids_NK.tolist(), pa.list_(pa.int16()))
        scores = pa.array(np.full(ids_NK.shape, 0.25).tolist(), pa.list_(pa.float16()))
        pq.write_table(pa.table({"scores": scores, "indices": indices}), folder / f"layer_{layer:02d}.parquet")
    return folder


def write_parquet(path: Path, **columns: object) -> Path:
    """Any columns; indices as lists of int16."""
    indices = pa.array(columns.pop("indices"), pa.list_(pa.int16()))
    pq.write_table(pa.table({"indices": indices, **columns}), path)
    return path


def record(step: int, layer: int, rank: int, ids_TK: np.ndarray, **more: object) -> dict[str, object]:
    """A line of Megatron's trace."""
    tokens, topk = ids_TK.shape
    line = {"step": step, "layer": layer, "rank": rank, "num_tokens": tokens, "topk": topk}
    return {**line, "top_indices": ids_TK.tolist(), **more}


def write_lines(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def write_megatron(folder: Path, ids_ILGTK: np.ndarray, num_tokens: np.ndarray | None = None) -> Path:
    """A file a rank, decoder layers numbered from 0."""
    folder.mkdir(exist_ok=True)
    iterations, layers, ranks, tokens, _ = ids_ILGTK.shape
    counts = np.full((iterations, ranks), tokens) if num_tokens is None else num_tokens
    for rank in range(ranks):
        records = [
            record(step, layer, rank, ids_ILGTK[step, layer, rank, : counts[step, rank]], stage="pre_dispatch")
            for step in range(iterations)
            for layer in range(layers)
        ]
        write_lines(folder / f"router_trace_rank{rank}.jsonl", records)
    return folder


def write_esft(folder: Path, ids_LNK: Ids, first_layer: int = 1, sequences: int = 3) -> Path:
    """A file a layer, a line a sequence: ids by tabs, two tabs, weights by tabs."""
    folder.mkdir(exist_ok=True)
    for layer, ids_NK in enumerate(ids_LNK, first_layer):
        lines = []
        for part in np.array_split(ids_NK, min(sequences, len(ids_NK))):
            ids = "\t".join(map(str, part.ravel()))
            lines.append(f"{ids}\t\t{chr(9).join('0.1250' for _ in range(part.size))}\n")
        (folder / f"expert_weights_{layer}.txt").write_text("".join(lines))
    return folder


def write_npz(path: Path, ids_LNK: Ids) -> Path:
    """ids [tokens, layers, K] and the lengths of two sequences."""
    tokens = ids_LNK.shape[1]
    lengths = np.array([tokens // 3, tokens - tokens // 3], np.int32)
    np.savez_compressed(path, ids=ids_LNK.transpose(1, 0, 2).astype(np.uint16), seq_len=lengths)
    return path
