"""DeepSeek-V2-Lite as ESFT writes it, and as an archive of arrays; real files are looked at where they are."""

import gzip
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hiermoe.records.project import CODE
from hiermoe.routing.trace import RoutingTrace
from tests.conftest import Command
from tests.routing.importers.files import some_ids, write_esft, write_npz
from tests.routing.importers.hostile import check_refused
from tests.routing.importers.test_round_trips import flat, imported

IDS = some_ids(layers=2, tokens=6)
REAL = CODE.parent / "shared" / "data" / "routes"


def line(folder: Path, content: bytes, name: str = "expert_weights_1.txt") -> Path:
    (folder / name).write_bytes(content)
    return folder


def of_layers(folder: Path, *tokens: int) -> Path:
    for layer, count in enumerate(tokens, 1):
        write_esft(folder, IDS[:1, :count], layer)
    return folder


GOOD = b"1\t2\t3\t\t.5\t.5\t.5\n"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda d: line(d, b"1\t2\t3\t4\t5\t6\n"), "line 1 is truncated or no line of ids, two tabs and weights"),
        (lambda d: line(d, b"1\t2\t3\t\t.5\t.5\n"), "line 1 has 3 ids and 2 weights"),
        (lambda d: line(d, b"1\t2\t3\t4\t\t1\t1\t1\t1\n"), "line 1 has 4 ids, no multiple of topk=3"),
        (lambda d: line(d, b"1\t2\t-3\t\t.5\t.5\t.5\n"), "line 1 is truncated or no line"),
        (lambda d: line(d, b"1\t2\t99999999999999999999999\t\t1\t1\t1\n"), "line 1, token 0: expert ids"),
        (
            lambda d: line(d, GOOD + b"\n1\t2\t3\t4\t5\t16\t\t1\t1\t1\t1\t1\t1\n"),
            "token 1 of layer 2: expert 16 is out",
        ),
        (lambda d: line(d, b"1\t2\t2\t\t1\t1\t1\n"), "line 1, token 0 of layer 2: a token has an expert twice"),
        (lambda d: line(d, b""), "it is empty"),
        (lambda d: line(d, b"PK\x03\x04"), "it is a zip archive"),
        (lambda d: line(d, gzip.compress(GOOD)[:-6]), "it is damaged or cut"),
        (lambda d: line(line(d, GOOD), GOOD, "expert_weights_1.txt.gz"), "are of one layer; leave one of them"),
        (lambda d: of_layers(d, 6, 5), "its sequences have not the 3 lengths of those in expert_weights_1.txt"),
        (lambda d: d, "no file in this folder is named expert_weights_*.txt"),
    ],
)
def test_bad_text(write: Callable[[Path], Path], message: str, hiermoe: Command, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    check_refused(hiermoe, "esft", write(folder), message, "--num-experts", "16", "--topk", "3")


def test_text_without_k_is_asked_about(hiermoe: Command, tmp_path: Path) -> None:
    check_refused(hiermoe, "", write_esft(tmp_path / "law", IDS), "give --topk K", "--num-experts", "16")


def archive(path: Path, method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def npy(array: object) -> bytes:
    held = io.BytesIO()
    np.save(held, np.asarray(array), allow_pickle=True)
    return held.getvalue()


def header(shape: tuple[int, ...], descr: str = "<i2") -> bytes:
    held = io.BytesIO()
    np.lib.format.write_array_header_1_0(held, {"descr": descr, "fortran_order": False, "shape": shape})
    return held.getvalue()


TLK = IDS.transpose(1, 0, 2).astype(np.int16)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: archive(p, ids=header((2**40, 2, 3))), "ids.npy has dtype int16, shape (1099511627776, 2, 3)"),
        (lambda p: archive(p, ids=header((1,), "|O") + b"x"), "ids.npy has dtype object"),
        pytest.param(
            lambda p: archive(p, ids=header((2**29,)) + bytes(2**30)),
            "no routing is that empty",
            marks=pytest.mark.slow,
        ),
        (lambda p: archive(p, zipfile.ZIP_LZMA, ids=npy(TLK)), "is packed by method 14"),
        (lambda p: archive(p, other=npy(TLK)), "it has no array ids; it has ['other.npy']"),
        (lambda p: archive(p, ids=npy(TLK.astype(float))), "dtype float64; the rule is an integer"),
        (lambda p: archive(p, ids=npy(TLK[0])), "shape (2, 3); the rule is one array [tokens, layers, K]"),
        (lambda p: archive(p, ids=npy(TLK - 5)), "token 0, layer 0: expert ids"),
        (lambda p: archive(p, ids=npy(TLK + 10)), "is outside 0..15"),
        (lambda p: archive(p, ids=npy(TLK), seq_len=npy([2, 3])), "seq_len sums up to 5, ids has 6 tokens"),
        (lambda p: archive(p, ids=npy(TLK), seq_len=npy([-2, 8])), "the rule is integers >= 0"),
        (lambda p: archive(p, ids=b"no array"), "it is truncated or no archive of arrays"),
        (lambda p: (p.write_bytes(archive(p, ids=npy(TLK)).read_bytes()[:200]), p)[1], "it is truncated"),
    ],
)
def test_bad_archive(write: Callable[[Path], Path], message: str, hiermoe: Command, tmp_path: Path) -> None:
    check_refused(hiermoe, "npz", write(tmp_path / "a.npz"), message, "--num-experts", "16")


@pytest.mark.skipif(not REAL.is_dir(), reason="the data of DeepSeek-V2-Lite is not beside the project")
@pytest.mark.parametrize("task", ["intent", "law", "summary"])
def test_deepseek_v2_lite(task: str, hiermoe: Command, tmp_path: Path) -> None:
    path, output = REAL / f"deepseek_v2_lite_{task}.npz", tmp_path / "a.trace"
    sizes = ["--num-experts", "64", "--first-layer", "2"]
    code, out, err = hiermoe("trace", "import", str(path), "--output", str(output), *sizes)
    assert code == 0, err
    with np.load(path) as there:
        ids_TLK, lengths = there["ids"], there["seq_len"]
    assert f"1 iterations x 26 layers x 1 ranks x {len(ids_TLK)} tokens x 6 of 64 experts" in out
    trace = RoutingTrace.load(output)
    assert trace.metadata.layers == list(range(2, 28))
    np.testing.assert_array_equal(flat(trace), ids_TLK.transpose(1, 0, 2))
    folder = write_esft(tmp_path / task, ids_TLK.transpose(1, 0, 2), sequences=len(lengths))
    as_text = imported("esft", folder, 64, topk=6)
    np.testing.assert_array_equal(as_text.expert_ids, trace.expert_ids)
    assert as_text.metadata.layers == trace.metadata.layers


def test_layers_and_tokens_are_cut(tmp_path: Path) -> None:
    cut = imported("npz", write_npz(tmp_path / "a.npz", IDS), first_layer=2, layers=(3,), max_tokens=4)
    np.testing.assert_array_equal(flat(cut), IDS[1:, :4])
    cut = imported("esft", write_esft(tmp_path / "law", IDS), topk=3, layers=(3,), max_tokens=4)
    np.testing.assert_array_equal(flat(cut), IDS[1:, :4])
    assert cut.metadata.layers == [3]
