"""TensorRT-LLM's expert statistics: meta_info.json and rank{r}_raw.safetensors, a tensor an iteration and layer.

``examples/wide_ep/ep_load_balancer`` writes them: ``meta_info.json`` has num_experts and num_experts_per_token, tensors
``"{iter}_{layer}"`` the token_selected_experts [T, K] of a rank. Layers are counted from 0 there, from 1 in the trace.
Tokens follow each other iteration after iteration, rank after rank.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from hiermoe.routing.importers.recording import Recording, Source, narrowed
from hiermoe.routing.safetensors_file import tensors
from hiermoe.routing.text_file import read_text
from hiermoe.routing.trace import MOST_EXPERTS

META = "meta_info.json"
_RAW = re.compile(r"rank(\d{1,6})_raw\.safetensors")
_KEY = re.compile(r"(\d{1,9})_(\d{1,4})")


def recognized(path: Path) -> str | None:
    """What the folder is, in words; None where it is of another form."""
    raw = raw_files(path) if path.is_dir() and (path / META).is_file() else []
    return f"TensorRT-LLM's expert statistics, raw, of {len(raw)} ranks" if raw else None


def read(source: Source) -> Recording:
    """Read all ranks.

    Raises:
        ValueError: not such a folder, tensors of other shapes than it says, or layers that differ in tokens.
    """
    folder = source.path
    raw = raw_files(folder) if folder.is_dir() else []
    if not raw:
        raise ValueError(f"{folder}: the rule is a folder with {META} and rank0_raw.safetensors")
    num_experts, topk = meta_of(folder)
    if source.topk not in (None, topk):
        raise ValueError(f"{folder / META}: num_experts_per_token={topk}, topk={source.topk} was asked for")
    found: dict[int, dict[tuple[int, int], tuple[str, np.ndarray]]] = {}
    for rank, path in raw:
        for (iteration, layer), array in by_iteration(path).items():
            where = f"{path}: {iteration}_{layer - 1}"
            if array.ndim != 2 or array.shape[1] != topk or array.dtype.kind not in "iu":
                raise ValueError(f"{where} is {array.dtype} {list(array.shape)}; the rule is integers [T, {topk}]")
            found.setdefault(layer, {})[iteration, rank] = (where, array)
    kept = source.kept(found)
    if not kept:
        raise ValueError(f"{folder}: it has no tokens")
    order = sorted(found[kept[0]])
    ids: dict[int, np.ndarray] = {}
    for layer in kept:
        if sorted(found[layer]) != order:
            raise ValueError(f"{folder}: layer {layer} has other iterations and ranks than layer {kept[0]}")
        for key in order:
            where, array = found[layer][key]
            if len(array) != len(found[kept[0]][key][1]):
                raise ValueError(f"{where} has {len(array)} tokens, layer {kept[0]} has {len(found[kept[0]][key][1])}")
        parts = [
            narrowed(array, lambda row, of=where: f"{of}: token {row}")
            for where, array in (found[layer][key] for key in order)
        ]
        ids[layer] = np.concatenate(parts)[: source.max_tokens]
    ends = np.cumsum([len(found[kept[0]][key][1]) for key in order])

    def where_row(layer: int, row: int) -> str:
        at = int(np.searchsorted(ends, row, side="right"))
        return f"{found[layer][order[at]][0]}: token {row - (int(ends[at - 1]) if at else 0)}, layer {layer}"

    notes = "Layers are TensorRT-LLM's plus 1. Tokens follow each other iteration after iteration, rank after rank."
    files = (folder / META, *(path for _, path in raw))
    return Recording(ids, files, where_row, notes, num_experts=num_experts)


def raw_files(folder: Path) -> list[tuple[int, Path]]:
    """Ranks and their files of single choices."""
    named = ((_RAW.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in named if match)


def meta_of(folder: Path) -> tuple[int, int]:
    """E and K.

    Raises:
        ValueError: the file does not say them.
    """
    path = folder / META
    try:
        said: Any = json.loads(read_text(path, 2**20))
        num_experts, topk = (said[key] for key in ("num_experts", "num_experts_per_token"))
    except (KeyError, TypeError, json.JSONDecodeError, RecursionError):
        raise ValueError(f"{path}: the rule is JSON with num_experts and num_experts_per_token") from None
    if type(num_experts) is not int or type(topk) is not int or not 1 <= topk <= num_experts <= MOST_EXPERTS:
        raise ValueError(f"{path}: num_experts={num_experts}, num_experts_per_token={topk}"[:200])
    return num_experts, topk


def by_iteration(path: Path) -> dict[tuple[int, int], np.ndarray]:
    """Tensors by iteration and layer, layers counted from 1.

    Raises:
        ValueError: damaged, or a tensor has another name.
    """
    found = {}
    for name, array in tensors(path).items():
        key = _KEY.fullmatch(name)
        if key is None:
            raise ValueError(f"{path}: tensor {name[:40]!r}; the rule for names is iteration_layer")
        found[int(key[1]), int(key[2]) + 1] = array
    return found
