"""What serving systems hand out: responses in base64, requests in JSON, TensorRT-LLM's folder; and bad ones of each."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Command
from tests.routing.importers.files import some_ids
from tests.routing.importers.hostile import check_refused
from tests.routing.importers.others import (
    npy_base64,
    write_requests,
    write_safetensors,
    write_sglang_responses,
    write_tensorrt_llm,
    write_vllm_responses,
)
from tests.routing.importers.test_round_trips import flat, imported

IDS = some_ids(layers=2, tokens=6)
TLK = IDS.transpose(1, 0, 2).astype(np.int16)


def test_vllm_responses_are_prompts_and_what_was_generated(tmp_path: Path) -> None:
    trace = imported("responses", write_vllm_responses(tmp_path / "a.json", IDS), first_layer=4)
    np.testing.assert_array_equal(flat(trace), IDS)
    assert trace.metadata.layers == [4, 5] and "Responses of vLLM" in trace.metadata.notes


def test_prefixes_from_the_cache_are_no_expert(tmp_path: Path) -> None:
    holed = TLK.copy()
    holed[:2] = -1
    path = said(tmp_path / "a.json", prompt_routed_experts=npy_base64(holed))
    np.testing.assert_array_equal(flat(imported("responses", path)), IDS[:, 2:])


def test_responses_of_two_systems_are_not_joined(tmp_path: Path) -> None:
    write_vllm_responses(tmp_path / "a.json", IDS)
    write_sglang_responses(tmp_path / "b.jsonl", IDS)
    with pytest.raises(ValueError, match=r"responses of SGLang and of vLLM"):
        imported("responses", tmp_path, topk=3)


def said(path: Path, **content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def counted(path: Path, tokens: int, content: bytes) -> Path:
    """SGLang's response of so many tokens and one before."""
    text = base64.b64encode(content).decode()
    return said(path, meta_info={"prompt_tokens": 1, "completion_tokens": tokens, "routed_experts": text})


def header(shape: tuple[int, ...]) -> str:
    return base64.b64encode(base64.b64decode(npy_base64(np.zeros(shape, np.int16)))[:128]).decode()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: said(p, routed_experts="no base64!"), "line 1, routed_experts: it is no base64"),
        (lambda p: said(p, routed_experts=[[1]]), "list; the rule is a text in base64"),
        (lambda p: said(p, routed_experts=header((6, 2, 3))), "in 0 bytes: it is truncated or no .npy"),
        (
            lambda p: said(p, routed_experts=base64.b64encode(b"\x93NUMPY\x07\x07").decode()),
            "it is truncated or no .npy",
        ),
        (lambda p: said(p, routed_experts=npy_base64(TLK[0])), "shape (2, 3); the rule is one array"),
        (lambda p: said(p, routed_experts=npy_base64(TLK * 0.5)), "dtype float64; the rule is an integer"),
        (lambda p: said(p, routed_experts=npy_base64(TLK - 9)), "token 0, layer 0: expert ids"),
        (lambda p: said(p, routed_experts=npy_base64(TLK + 14)), "is outside 0..15"),
        (lambda p: said(p, routed_experts=npy_base64(TLK.astype(np.int64) + 2**40)), "token 0, layer 0: expert ids"),
        (lambda p: said(p, routed_experts=base64.b64encode(bytes(24)).decode()), "the rule is numbers beside it"),
        (lambda p: counted(p, 6, bytes(4 * 6 * 3 + 4)), "76 bytes are no int32 [6 tokens, layers, topk=3]"),
        (lambda p: counted(p, 2**31, bytes(72)), "the rule is numbers beside it"),
        (lambda p: counted(p, 0, bytes(72)), "72 bytes are no int32 [0 tokens"),
        (lambda p: said(p, text="nothing"), "no response of it has prompt_routed_experts or routed_experts"),
    ],
)
def test_bad_response(write: Callable[[Path], Path], message: str, hiermoe: Command, tmp_path: Path) -> None:
    check_refused(hiermoe, "responses --topk 3", write(tmp_path / "a.json"), message, "--num-experts", "16")


def test_response_without_shape_asks_for_k(hiermoe: Command, tmp_path: Path) -> None:
    path = write_sglang_responses(tmp_path / "a.jsonl", IDS)
    check_refused(hiermoe, "", path, "it has no shape; give --topk K", "--num-experts", "16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"3": [[1, 2]], "4": [[1, 2, 3]]}]', "line 1: layer 5 has 1 tokens of 3 experts"),
        ('[{"3": [[1, 2]], "4": [[1, 2], [3, 4]]}]', "line 1: layer 5 has 2 tokens of 2 experts"),
        ('[{"3": [[1, 2]]},\n{"3": [[1, 2], [3]]}]', "line 2: layer 4 is no list of lists of K integers"),
        ('[{"3": [[1, 2.5]]}]', "layer 4 is no list of lists of K integers"),
        ('[{"3": [[1, 99999999999999999999999]]}]', "layer 4 is no list of lists of K integers"),
        ('[{"3": "abc"}]', "layer 4 is no list of lists"),
        ('[{"3": []}]', "layer 4 is no list of lists"),
        ('[{"3": [[1, -2]]}]', "token 0, layer 4: expert ids [1, -2]"),
        ('[{"3": [[1, 16]]}]', "token 0, layer 4: expert 16 is outside 0..15"),
        ('[{"3": [[1, 1]]}]', "token 0, layer 4: a token has an expert twice"),
        ('[{"layer": [[1, 2]]}]', "'layer' is no number of a layer"),
        ('[{"3": [[1, 2]]', "its object has no end"),
        ('[{"3": [[1, 2}]', "is truncated or malformed"),
        ('[{"3": null}]', "it has no tokens"),
        ("", "it has no tokens"),
    ],
)
def test_bad_request(content: str, message: str, hiermoe: Command, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    check_refused(hiermoe, "requests", tmp_path / "a.json", message, "--num-experts", "16")


def test_requests_say_which_layers_are_dense_and_leave_tokens_without_routing_out(tmp_path: Path) -> None:
    trace = imported("requests", write_requests(tmp_path / "requests", IDS))
    assert trace.metadata.left_out == ("layers 3, which are null throughout",)
    (tmp_path / "a.json").write_text('[{"3": [[1, 2]], "4": [[3, 4]]}, {"3": [[5, 6]], "4": null}]')
    assert flat(imported("requests", tmp_path / "a.json")).tolist() == [[[1, 2]], [[3, 4]]]


def tensors_of(folder: Path, **arrays: np.ndarray) -> Path:
    write_tensorrt_llm(folder, IDS, 16, ranks=1)
    write_safetensors(folder / "rank0_raw.safetensors", {name.lstrip("_"): array for name, array in arrays.items()})
    return folder


def with_header(folder: Path, item: dict[str, object], data: bytes = bytes(24)) -> Path:
    write_tensorrt_llm(folder, IDS, 16, ranks=1)
    text = json.dumps({"1_3": item}).encode()
    (folder / "rank0_raw.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def raw(folder: Path, content: bytes) -> Path:
    write_tensorrt_llm(folder, IDS, 16, ranks=1)
    (folder / "rank0_raw.safetensors").write_bytes(content)
    return folder


def meta(folder: Path, content: str) -> Path:
    write_tensorrt_llm(folder, IDS, 16, ranks=1)
    (folder / "meta_info.json").write_text(content)
    return folder


I32 = IDS[0].astype(np.int32)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda d: tensors_of(d, _1_3=I32.astype(np.float32)), "1_3 is float32 [6, 3]; the rule is integers [T, 3]"),
        (lambda d: tensors_of(d, _1_3=I32[:, :2]), "1_3 is int32 [6, 2]; the rule is integers [T, 3]"),
        (lambda d: tensors_of(d, _1_3=I32, _1_4=I32[:5]), "1_4 has 5 tokens, layer 4 has 6"),
        (lambda d: tensors_of(d, _1_3=I32, _2_4=I32), "layer 5 has other iterations and ranks than layer 4"),
        (lambda d: tensors_of(d, _1_3=I32 - 9), "1_3: token 0: expert ids"),
        (lambda d: tensors_of(d, _1_3=I32 + 14), "is outside 0..15"),
        (lambda d: tensors_of(d, name=I32), "tensor 'name'; the rule for names is iteration_layer"),
        (
            lambda d: with_header(d, {"dtype": "I32", "shape": [2**42, 3], "data_offsets": [0, 24]}),
            "does not fit 24 by",
        ),
        (lambda d: with_header(d, {"dtype": "I32", "shape": [2, 3], "data_offsets": [0, 2**44]}), "does not fit 24 by"),
        (lambda d: with_header(d, {"dtype": "I32", "shape": [-2, -3], "data_offsets": [0, 24]}), "does not fit 24 by"),
        (lambda d: with_header(d, {"dtype": "BOOL", "shape": [24], "data_offsets": [0, 24]}), "does not fit 24 bytes"),
        (lambda d: with_header(d, {}), "does not fit 24 bytes"),
        (lambda d: raw(d, (2**60).to_bytes(8, "little") + b"{}"), "a header of 1152921504606846976 bytes in 10"),
        (lambda d: raw(d, b"\x02\0\0\0\0\0\0\0[]"), "its header is no JSON of tensors"),
        (lambda d: raw(d, b""), "it is truncated or no safetensors file"),
        (lambda d: meta(d, "{}"), "the rule is JSON with num_experts and num_experts_per_token"),
        (
            lambda d: meta(d, '{"num_experts": 1e9, "num_experts_per_token": 3}'),
            "meta_info.json: num_experts=1000000000",
        ),
        (lambda d: meta(d, '{"num_experts": 2, "num_experts_per_token": 3}'), "num_experts=2, num_experts_per_token=3"),
        (lambda d: d, "the rule is a folder with meta_info.json and rank0_raw.safetensors"),
    ],
)
def test_bad_statistic(write: Callable[[Path], Path], message: str, hiermoe: Command, tmp_path: Path) -> None:
    folder = tmp_path / "statistic"
    folder.mkdir()
    check_refused(hiermoe, "tensorrt-llm", write(folder), message)


def test_ranks_of_a_statistic_follow_each_other(tmp_path: Path) -> None:
    trace = imported("tensorrt-llm", write_tensorrt_llm(tmp_path, IDS, 16, ranks=3), None)
    np.testing.assert_array_equal(flat(trace), IDS)
    assert trace.metadata.num_experts == 16 and trace.metadata.layers == [4, 5]
