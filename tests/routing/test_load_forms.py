"""Loads that others have counted come out by layer; bad files end with one line."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hiermoe.routing.importers.detection import detected
from hiermoe.routing.load_forms import LOAD_FORMS
from hiermoe.routing.load_table import read_loads
from tests.conftest import Command
from tests.routing.importers.others import physical_map, saved, write_safetensors

LOADS = np.random.default_rng(0).integers(1, 9, (3, 16))  # [layers, E]


def write_counts(folder: Path, loads_LE: np.ndarray) -> Path:
    """Two ranks with half of the counts each, two iterations."""
    folder.mkdir()
    for rank in range(2):
        part = {f"{i}_{layer}": row.astype(np.float32) / 4 for i in (5, 6) for layer, row in enumerate(loads_LE)}
        write_safetensors(folder / f"rank{rank}.safetensors", part)
    return folder


def write_tpe(folder: Path, loads_LE: np.ndarray) -> Path:
    """Two ranks with half of the experts each; a micro-batch has a token of each, another the rest."""
    folder.mkdir()
    for rank, part in enumerate(np.array_split(loads_LE, 2, axis=1)):
        lines = [
            {"iter": 1, "block": "decoder", "layer": layer, "tpe": [[1] * len(row), (row - 1).tolist()]}
            for layer, row in enumerate(part, 1)
        ]
        lines.append({"iter": 1, "block": "mtp", "layer": 0, "tpe": [[99]]})
        (folder / f"rank{rank}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def write_gguf(path: Path, loads_LE: np.ndarray, count: int | None = None, kind: int = 0) -> Path:
    """An imatrix: values of several types, counts of two matrices a layer."""
    pairs = [("general.type", struct.pack("<I", 8) + gguf_text("imatrix"))]
    pairs += [("imatrix.chunk_size", struct.pack("<II", 4, 512))]
    pairs += [("imatrix.datasets", struct.pack("<IIQ", 9, 8, 2) + gguf_text("a") + gguf_text("bc"))]
    names = [f"blk.{i}.ffn_{kind}_exps.weight.counts" for i in range(len(loads_LE)) for kind in ("up", "down")]
    infos, data = [], b""
    for name, row in zip(
        [*names, "blk.0.attn_q.weight.counts"], [*np.repeat(loads_LE, 2, 0), loads_LE[0]], strict=True
    ):
        infos.append(gguf_text(name) + struct.pack("<IQQIQ", 2, 1, count or len(row), kind, len(data)))
        data += row.astype("<f4").tobytes() + bytes(-4 * len(row) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(pairs))
    head += b"".join(gguf_text(key) + value for key, value in pairs) + b"".join(infos)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def npy(path: Path, array: Any) -> Path:
    np.save(path, array)
    return path


def per_pass(loads_LE: np.ndarray) -> dict[str, Any]:
    """Counts of physical places, each expert's on one of its two."""
    map_LP = physical_map(*loads_LE.shape)
    counts = np.zeros(map_LP.shape, np.int32)
    for layer, places in enumerate(map_LP):
        counts[layer, np.argsort(places, kind="stable")[::2]] = loads_LE[layer]
    records = [{"forward_pass_id": i, "global_physical_count": torch.from_numpy(counts)} for i in range(2)]
    return {"records": records, "last_physical_to_logical_map": torch.from_numpy(map_LP)}


STAT = {"rank": 0, "logical_count": torch.from_numpy(np.stack([LOADS, LOADS]).astype(np.int32))}
WRITERS: dict[str, tuple[str, Callable[[Path], Path], int, float]] = {  # form, file, first layer, unit
    "numpy": ("eplb", lambda d: npy(d / "a.npy", LOADS.astype(float)), 0, 1),
    "torch": ("eplb", lambda d: saved(d / "a.pt", torch.from_numpy(LOADS)), 0, 1),
    "stat": ("sglang-counts", lambda d: saved(d / "a.pt", STAT), 1, 2),
    "per_pass": ("sglang-counts", lambda d: saved(d / "a.pt", per_pass(LOADS)), 1, 2),
    "tpe": ("tokens-per-expert", lambda d: write_tpe(d / "tokens_per_expert", LOADS), 1, 1),
    "tensorrt": ("tensorrt-llm-counts", lambda d: write_counts(d / "statistic", LOADS), 1, 1),
    "imatrix": ("imatrix", lambda d: write_gguf(d / "a.gguf", LOADS), 1, 1),
}


def test_every_form_is_tested() -> None:
    assert {form for form, *_ in WRITERS.values()} == set(LOAD_FORMS)


@pytest.mark.parametrize("name", WRITERS)
def test_loads_come_out_by_layer(name: str, tmp_path: Path) -> None:
    form, write, first, unit = WRITERS[name]
    path = write(tmp_path)
    assert [each for each, module in LOAD_FORMS.items() if module.recognized(path)] == [form]
    for layer in range(3):
        table = read_loads(path, 16, layer)
        np.testing.assert_array_equal(table.load_E, unit * LOADS[layer])
        assert table.layer == first + layer and f"layer={layer} is number {first + layer}" in table.notes[0]
    with pytest.raises(ValueError, match="layer=3 is not among its 3 layers"):
        read_loads(path, 16, 3)
    with pytest.raises(ValueError, match="has 16 experts, not 17"):
        read_loads(path, 17, 0)
    with pytest.raises(ValueError, match="loads alone, no tokens; hiermoe advise loads="):
        detected(path)


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def line(folder: Path, content: str) -> Path:
    (folder / "rank0.jsonl").write_text(content)
    return folder


HUGE = torch.zeros(1, dtype=torch.int32).expand(2**40, 3, 16)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda d: npy(d / "a.npy", -LOADS), "layer 0: load of expert 0 is -"),
        (lambda d: npy(d / "a.npy", LOADS * np.nan), "load of expert 0 is nan; the rule is >= 0"),
        (lambda d: npy(d / "a.npy", LOADS * 0), "all loads are 0"),
        (lambda d: npy(d / "a.npy", np.array([["a"]])), "the rule is numbers"),
        (lambda d: npy(d / "a.npy", np.ones((1, 70000), np.int8)), "the rule is [layers, 1 to 65535 experts]"),
        (lambda d: cut(npy(d / "a.npy", LOADS), 200), "it is truncated or no .npy file"),
        (lambda d: saved(d / "a.pt", {"logical_count": HUGE}), "the file has not as many numbers as it refers to"),
        (lambda d: saved(d / "a.pt", {"logical_count": -STAT["logical_count"]}), "logical_count has a count below 0"),
        (lambda d: saved(d / "a.pt", {"logical_count": torch.zeros(2, 2)}), "the rule is integers"),
        (
            lambda d: saved(d / "a.pt", per_pass(LOADS) | {"last_physical_to_logical_map": torch.zeros(3, 4).int()}),
            "not",
        ),
        (lambda d: line(d, '{"layer": 1, "tpe": [[1, -2]]}'), "the rule is a layer, and tpe of lists of numbers >= 0"),
        (lambda d: line(d, '{"layer": 1, "tpe": [[1, 2], [3]]}'), "line 1 is truncated or has no layer or tpe"),
        (
            lambda d: line(d, '{"layer": 1, "tpe": [[1, 2]]}\n{"layer": 1, "tpe": [[1]]}'),
            "line 2: layer 1 has 1 experts",
        ),
        (lambda d: line(d, '{"layer": 1, "tpe": [[1, 2]'), "its object has no end"),
        (lambda d: cut(write_gguf(d / "a.gguf", LOADS), 60), "it is truncated"),
        (lambda d: cut(write_gguf(d / "a.gguf", LOADS), 900), "lie behind its end: it is truncated"),
        (lambda d: write_gguf(d / "a.gguf", LOADS, count=2**40), "lie behind its end: it is truncated"),
        (lambda d: write_gguf(d / "a.gguf", LOADS, kind=1), "is of type 1; the rule is f32"),
        (lambda d: write_gguf(d / "a.gguf", LOADS * np.nan), "load of expert 0 is nan"),
        (lambda d: write_counts(d / "s", -LOADS), "layer 1: load of expert 0 is -"),
        (lambda d: write_counts(d / "s", LOADS[:, :, None]), "the rule is [E]"),
    ],
)
def test_bad_loads(write: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        read_loads(write(tmp_path), None, 0)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_layers_without_load_are_left_out_and_said(tmp_path: Path) -> None:
    loads = LOADS.copy()
    loads[0] = 0
    table = read_loads(npy(tmp_path / "a.npy", loads), 16, 0)
    assert table.layer == 1 and "Layers 0 have no load (dense) and were left out." in table.notes[0]
    np.testing.assert_array_equal(table.load_E, LOADS[1])


@pytest.mark.parametrize("name", ["stat", "tpe"])
def test_advice_takes_them(name: str, hiermoe: Command, tmp_path: Path) -> None:
    path = WRITERS[name][1](tmp_path)
    sizes = ["cluster=a6000_1x8", "tokens_per_rank=32", "iterations=8", "hidden_size=64", "moe_ffn_hidden_size=64"]
    code, _, err = hiermoe(
        "advise", f"loads={path}", "layer=1", "topk=2", *sizes, "systems=[hd2]", f"output={tmp_path}/page"
    )
    assert code == 0, err
    assert "layer 2" in (tmp_path / "page" / "advice.md").read_text()
