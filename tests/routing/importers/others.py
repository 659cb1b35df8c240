"""Routing written in the forms of serving systems and of rollouts: [layer, N, K] as each of them has it."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import torch

Ids = np.ndarray  # [layer, N, K]
EXPERTS = 1000  # that any test uses at most; physical places are twice as many


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def physical_map(layers: int, num_experts: int) -> np.ndarray:
    """Two places for every expert, shuffled: int64 [layers, P]."""
    rng = np.random.default_rng(1)
    return np.stack([rng.permutation(np.repeat(np.arange(num_experts), 2)) for _ in range(layers)])


def recorder(ids_LNK: Ids, num_experts: int, first_pass: int = 0, passes: int = 3) -> dict[str, object]:
    """Content of SGLang's recorder, mode per_token: a dense layer, then the ids, each at a place of its expert."""
    layers, _, topk = ids_LNK.shape
    map_LP = physical_map(layers + 1, num_experts)
    places = [np.argsort(row, kind="stable")[::2] for row in map_LP[1:]]  # of every expert, the first
    records = []
    for number, part in enumerate(np.array_split(ids_LNK, passes, axis=1), first_pass):
        ids = np.full((layers + 1, part.shape[1], max(8, topk)), -1, np.int32)
        for layer, where in enumerate(places):
            ids[layer + 1, :, :topk] = where[part[layer]]
        records.append({"forward_pass_id": number, "rank": 0, "topk_ids_of_layer": torch.from_numpy(ids)})
    return {"records": records, "last_physical_to_logical_map": torch.from_numpy(map_LP)}


def write_recorder(path: Path, ids_LNK: Ids, num_experts: int) -> Path:
    return saved(path, recorder(ids_LNK, num_experts))


def dense_first(ids_LNK: Ids) -> np.ndarray:
    """int32 [N, layers, K] with a dense layer before: zeros, or -1 at K = 1, where 0 would be an expert."""
    dense = np.zeros_like(ids_LNK[:1]) - (ids_LNK.shape[2] == 1)
    return np.concatenate([dense, ids_LNK]).transpose(1, 0, 2).astype(np.int32)


def write_sglang_responses(path: Path, ids_LNK: Ids) -> Path:
    lines = []
    for part in np.array_split(dense_first(ids_LNK), min(2, ids_LNK.shape[1])):
        text = base64.b64encode(np.ascontiguousarray(part, "<i4").tobytes()).decode()
        meta = {"prompt_tokens": 1, "completion_tokens": len(part), "routed_experts": text}
        lines.append(json.dumps({"text": "x", "meta_info": meta}) + "\n")
    path.write_text("".join(lines))
    return path


def npy_base64(array: np.ndarray) -> str:
    held = io.BytesIO()
    np.save(held, array)
    return base64.b64encode(held.getvalue()).decode()


def write_vllm_responses(path: Path, ids_LNK: Ids) -> Path:
    prompt, generated = np.array_split(ids_LNK.transpose(1, 0, 2).astype(np.int16), [ids_LNK.shape[1] // 2])
    response: dict[str, object] = {"choices": [{"routed_experts": npy_base64(generated)}]}
    if len(prompt):
        response["prompt_routed_experts"] = npy_base64(prompt)
    path.write_text(json.dumps([response]))
    return path


def write_rollouts(path: Path, ids_LNK: Ids) -> Path:
    parts = np.array_split(dense_first(ids_LNK), min(3, ids_LNK.shape[1]))
    samples = [{"status": "completed", "rollout_routed_experts": part} for part in parts]
    return saved(path, {"rollout_id": 3, "samples": samples})


def write_replay(path: Path, ids_LNK: Ids) -> Path:
    return saved(path, [torch.from_numpy(ids.copy()) for ids in ids_LNK])


def write_logits(path: Path, ids_LNK: Ids, num_experts: int) -> Path:
    """Logits whose largest are the ids, in their order."""
    layers, tokens, topk = ids_LNK.shape
    logits = np.full((layers, tokens, num_experts), -1.0, np.float32)
    np.put_along_axis(logits, ids_LNK, np.broadcast_to(np.arange(topk, 0, -1, dtype=np.float32), ids_LNK.shape), 2)
    return saved(path, tuple(torch.from_numpy(each).bfloat16() for each in logits))


def write_requests(folder: Path, ids_LNK: Ids) -> Path:
    """Requests of a prefill of several tokens and a decoded one; layers from 3 on, the one before is dense."""
    folder.mkdir(exist_ok=True)
    for number, part in enumerate(np.array_split(ids_LNK, min(2, ids_LNK.shape[1]), axis=1)):
        entries = [part[:, : max(1, part.shape[1] - 1)], part[:, max(1, part.shape[1] - 1) :]]
        content = [
            {"2": None, **{str(layer): ids.tolist() for layer, ids in enumerate(entry, 3)}}
            for entry in entries
            if entry.shape[1]
        ]
        (folder / f"request_{number}.json").write_text(json.dumps(content))
    return folder


def write_safetensors(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    header, at, names = {}, 0, {"i": "I", "u": "U", "f": "F"}
    for name, array in arrays.items():
        kind = f"{names[array.dtype.kind]}{8 * array.dtype.itemsize}"
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    content = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return path


def write_tensorrt_llm(folder: Path, ids_LNK: Ids, num_experts: int, ranks: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    meta = {"num_experts": num_experts, "num_experts_per_token": ids_LNK.shape[2]}
    (folder / "meta_info.json").write_text(json.dumps(meta))
    steps = [np.array_split(part, ranks, axis=1) for part in np.array_split(ids_LNK, 2, axis=1)]
    for rank in range(ranks):
        arrays = {
            f"{100 + step}_{layer}": ids.astype(np.int32)
            for step, parts in enumerate(steps)
            for layer, ids in enumerate(parts[rank], 3)
        }
        write_safetensors(folder / f"rank{rank}_raw.safetensors", arrays)
    return folder
