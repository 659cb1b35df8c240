"""Responses of SGLang and vLLM with routed experts in base64, as JSON: one, an array, a line each, a folder of files.

SGLang (``return_routed_experts``): ``meta_info.routed_experts`` is little-endian int32 [len - 1, all layers, K] without
its shape. K is asked for (--topk), the length is ``prompt_tokens + completion_tokens - 1`` of ``meta_info``, and layers
are what is left; they are counted from 1, dense ones are zeros. vLLM: ``prompt_routed_experts`` and ``routed_experts``,
at the top or in ``choices``, are a .npy file each (int16 [tokens, MoE layers, K], -1 for a prefix from the cache; older
int32 with all layers). Theirs have no numbers: they are counted by place, from 0 or ``--first-layer``.

Requests follow each other; in one, its prompt comes first.
"""

import base64
import binascii
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hiermoe.routing.importers.json_records import objects
from hiermoe.routing.importers.recording import Recording, Source
from hiermoe.routing.importers.stacked import Part, from_parts
from hiermoe.routing.text_file import beginning

_KEYS = ("prompt_routed_experts", "routed_experts")
_PATTERNS = ("*.json", "*.jsonl", "*.json.*", "*.jsonl.*")


def recognized(path: Path) -> str | None:
    """What the file or folder is, in words; None where it is of another form."""
    files = sorted({file for pattern in _PATTERNS for file in path.glob(pattern)}) if path.is_dir() else [path]
    if not files or not any(f'"{key}"'.encode() in beginning(files[0]) for key in _KEYS):
        return None
    return f"responses with routed experts, as SGLang and vLLM give them, {len(files)} files"


def read(source: Source) -> Recording:
    """Read all responses.

    Raises:
        ValueError: no response has routed experts, one is damaged, or they differ in layers or K.
    """
    files = source.files(*_PATTERNS)
    parts: list[Part] = []
    kinds: set[str] = set()
    for path in files:
        for line, text in objects(path):
            where = f"{path}: line {line}"
            try:
                response = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is truncated or malformed: {str(error).splitlines()[0]}") from None
            for name, encoded, meta in _encoded(response):
                kind, ids = _decoded(source, f"{where}, {name}", encoded, meta)
                kinds.add(kind)
                parts.append(Part(f"{where}, {name}", ids))
    if not parts:
        raise ValueError(f"{source.path}: no response of it has {' or '.join(_KEYS)}")
    if len(kinds) > 1:
        raise ValueError(f"{source.path}: it has responses of SGLang and of vLLM, which count layers differently")
    first = 1 if "SGLang" in kinds else 0
    notes = f"Responses of {kinds.pop()}, one after another; layers are numbered by place."
    return from_parts(source, tuple(files), parts, first, notes)


def _encoded(response: Any) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Routed experts in a response: what they are called, in base64, and what stands beside them."""
    if not isinstance(response, dict):
        return
    choices = response.get("choices")
    places: list[Any] = [response, response.get("meta_info"), *(choices if isinstance(choices, list) else ())]
    for place in (each for each in places if isinstance(each, dict)):
        for key in _KEYS:
            if place.get(key) is not None:
                yield key, place[key], place


def _decoded(source: Source, where: str, encoded: Any, meta: dict[str, Any]) -> tuple[str, np.ndarray]:
    """Who wrote it, and the ids: integer [tokens, layers, K]."""
    if not isinstance(encoded, str):
        raise ValueError(f"{where}: {type(encoded).__name__}; the rule is a text in base64")
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: it is no base64: {error}") from None
    if content.startswith(b"\x93NUMPY"):
        return "vLLM", _narrow(_npy(where, content))
    if source.topk is None:
        raise ValueError(f"{where}: it has no shape; give --topk K")
    counts: list[Any] = [meta.get(key) for key in ("prompt_tokens", "completion_tokens")]
    if not all(type(count) is int and 0 <= count < 2**31 for count in counts):
        raise ValueError(f"{where}: prompt_tokens and completion_tokens are {counts}; the rule is numbers beside it")
    tokens = sum(counts) - 1
    row = 4 * tokens * source.topk
    if row <= 0 or not content or len(content) % row:
        raise ValueError(
            f"{where}: {len(content)} bytes are no int32 [{tokens} tokens, layers, topk={source.topk}]: it is "
            "truncated, or K is another one"
        )
    return "SGLang", _narrow(np.frombuffer(content, "<i4").reshape(tokens, -1, source.topk))


def _npy(where: str, content: bytes) -> np.ndarray:
    """An array whose header fits the bytes behind it."""
    file = io.BytesIO(content)
    try:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = readers[np.lib.format.read_magic(file)](file)
    except Exception as error:  # numpy raises several kinds on altered headers
        raise ValueError(f"{where}: it is truncated or no .npy: {str(error).splitlines()[0]}") from None
    size = dtype.itemsize
    for length in shape:
        size *= length
    if dtype.hasobject or size != len(content) - file.tell():
        raise ValueError(f"{where}: {dtype} {shape} in {len(content) - file.tell()} bytes: it is truncated or no .npy")
    array = np.frombuffer(content, dtype, offset=file.tell())
    return array.reshape(shape, order="F" if fortran_order else "C")


def _narrow(ids: np.ndarray) -> np.ndarray:
    """The same in two bytes where that loses nothing; what does not fit is refused where all parts are."""
    fits = np.issubdtype(ids.dtype, np.integer) and ids.size and ids.min() >= -(2**15) and ids.max() < 2**15
    return ids.astype(np.int16) if fits and ids.dtype.itemsize > 2 else ids
