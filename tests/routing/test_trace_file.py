"""A trace file gives back what was saved, the same bytes every time, and no damage goes unseen."""

import hashlib
import io
import json
import tracemalloc
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiermoe.routing.trace import RoutingTrace
from hiermoe.routing.trace_archive import read_archive
from tests.routing.worlds import a_trace

Change = Callable[[dict[str, Any]], object]


def assert_same(a: RoutingTrace, b: RoutingTrace) -> None:
    assert a.metadata == b.metadata
    assert a.expert_ids.dtype == b.expert_ids.dtype
    np.testing.assert_array_equal(a.expert_ids, b.expert_ids)
    np.testing.assert_array_equal(a.num_tokens, b.num_tokens)
    assert (a.weights is None) == (b.weights is None)
    if a.weights is not None and b.weights is not None:
        assert a.weights.dtype == b.weights.dtype
        np.testing.assert_array_equal(a.weights, b.weights)


def rewrite(path: Path, change: Change) -> None:
    """Change the header of a trace file and put everything else back as it was."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(members["metadata.json"])
    change(header)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, json.dumps(header) if name == "metadata.json" else content)


@cache
def saved_bytes() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "saved.trace"
        a_trace().save(path)
        return path.read_bytes()


def load_bytes(content: bytes) -> RoutingTrace:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "read.trace"
        path.write_bytes(content)
        return RoutingTrace.load(path)


@pytest.mark.parametrize("num_experts", [16, 256, 257])
@pytest.mark.parametrize("num_tokens", [None, [[5, 0], [3, 2], [1, 5]]])
def test_load_gives_back_what_was_saved(tmp_path: Path, num_experts: int, num_tokens: list[list[int]] | None) -> None:
    trace = a_trace(num_tokens=num_tokens, num_experts=num_experts)
    trace.save(tmp_path / "a.trace")
    assert_same(RoutingTrace.load(tmp_path / "a.trace"), trace)


def test_weights_survive_the_round_trip(tmp_path: Path) -> None:
    plain = a_trace()
    weights = np.random.default_rng(1).random(plain.expert_ids.shape).astype(np.float16)
    trace = RoutingTrace(plain.expert_ids, plain.num_tokens, plain.metadata, weights)
    trace.save(tmp_path / "a.trace")
    assert_same(RoutingTrace.load(tmp_path / "a.trace"), trace)


def test_same_trace_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.trace", "b.trace"):
        a_trace().save(tmp_path / name)
    assert (tmp_path / "a.trace").read_bytes() == (tmp_path / "b.trace").read_bytes()


def test_save_makes_its_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    a_trace().save(tmp_path / "new" / "a.trace")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.trace"]


def test_numpy_reads_the_arrays_of_a_trace_file(tmp_path: Path) -> None:
    trace = a_trace()
    trace.save(tmp_path / "a.trace")
    with np.load(tmp_path / "a.trace") as arrays:
        np.testing.assert_array_equal(arrays["expert_ids"], trace.expert_ids)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no trace at .*none\.trace"):
        RoutingTrace.load(tmp_path / "none.trace")


@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_truncated_file_is_refused(share: float) -> None:
    content = saved_bytes()
    with pytest.raises(ValueError, match="truncated or not a trace"):
        load_bytes(content[: int(share * len(content))])


@given(share=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(max_examples=300, derandomize=True, deadline=None)
def test_altered_byte_is_refused_or_changes_nothing(share: float, flip: int) -> None:
    content = bytearray(saved_bytes())
    content[int(share * len(content))] ^= flip
    try:
        loaded = load_bytes(bytes(content))
    except ValueError as error:
        assert "read.trace" in str(error)
        assert "\n" not in str(error)
    else:
        assert_same(loaded, a_trace())


def test_altered_array_in_an_intact_zip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    a_trace().save(path)
    rewrite(path, lambda header: header["sha256"].update(num_tokens="0" * 64))
    with pytest.raises(ValueError, match=r"a\.trace is altered: checksum of num_tokens does not match"):
        RoutingTrace.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["metadata"].pop("corpus"), "bad metadata: corpus: is missing"),
        (lambda h: h["metadata"].update(colour="red"), "bad metadata: colour=red: no such key"),
        (lambda h: h["metadata"].update(seed="many"), "bad metadata: seed=many: "),
        (lambda h: h["metadata"].update(topk=9), "topk=9, num_recorded=4"),
        (lambda h: h["metadata"].update(num_recorded=5), "expert_ids stores 4 experts per token, metadata says 5"),
        (lambda h: h["metadata"].update(num_experts=9), "names expert 15, num_experts is 9"),
        (lambda h: h["metadata"].update(layers=[0]), "metadata names 1 layers, expert_ids has 2"),
        (lambda h: h.update(metadata=7), "is altered"),
        (lambda h: h.pop("metadata"), "not a trace"),
        (lambda h: h["sha256"].pop("expert_ids"), "is altered: checksum of expert_ids does not match"),
        (lambda h: h.update(sha256=7), "is altered"),
        (lambda h: h["sha256"].update(colours="0"), "not a trace"),
    ],
)
def test_altered_metadata_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    path = tmp_path / "a.trace"
    a_trace().save(path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message) as raised:
        RoutingTrace.load(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(format=2), "has format 2, this version reads 1"),
        (lambda h: (h.clear(), h.update(format=2, laid_out="anew")), "has format 2, this version reads 1"),
        (lambda h: h.pop("format"), "not a trace"),
    ],
)
def test_another_format_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    path = tmp_path / "a.trace"
    a_trace().save(path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        RoutingTrace.load(path)


def test_zip_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", expert_ids=np.zeros(3))
    with pytest.raises(ValueError, match="not a trace"):
        RoutingTrace.load(tmp_path / "a.npz")


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def only_header(descr: str, *shape: int) -> bytes:
    """An array's file that ends after its header."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def with_arrays(path: Path, arrays: dict[str, bytes], change: Change = lambda header: None) -> Path:
    """A trace with other arrays, whose checksums match."""
    members = {}
    with zipfile.ZipFile(io.BytesIO(saved_bytes())) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members |= {f"{name}.npy": content for name, content in arrays.items()}
    header = json.loads(members.pop("metadata.json"))
    header["sha256"] = {name[:-4]: hashlib.sha256(content).hexdigest() for name, content in members.items()}
    change(header)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        for name, content in {"metadata.json": json.dumps(header).encode(), **members}.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"expert_ids": only_header("|u1", 2**24, 2, 2, 2**14, 16)}, "17592186044416 bytes, and 0 are there"),
        ({"expert_ids": only_header("|u1", 2**60, 2**60, 2**60, 1, 1)}, "bytes, and 0 are there"),
        ({"expert_ids": only_header("|u1", 10**12, 1, 1, 0, 4)}, r"num_tokens has shape \(3, 2\), expert_ids asks"),
        ({"num_tokens": only_header("<i4", 10**12, 1)}, "4000000000000 bytes, and 0 are there"),
        ({"expert_ids": np.zeros((3, 2, 2, 5, 4))}, "expert_ids has dtype float64; the rule is an integer"),
        ({"num_tokens": np.full((3, 2), "5")}, "num_tokens has dtype <U1; the rule is an integer"),
        ({"num_tokens": np.full((3, 2), 5 + 1j)}, "num_tokens has dtype complex128; the rule is an integer"),
        ({"num_tokens": np.full((3, 2), 4.5)}, "num_tokens has dtype float64; the rule is an integer"),
        ({"num_tokens": np.full((3, 2), 5, "m8[s]")}, "num_tokens has dtype timedelta64.s.; the rule is an integer"),
        ({"num_tokens": np.full((3, 2), True)}, "num_tokens has dtype bool; the rule is an integer"),
        ({"num_tokens": np.zeros((3, 2), [("a", "i4")])}, "num_tokens has dtype .*; the rule is an integer"),
        ({"num_tokens": only_header("|O", 3, 2)}, "num_tokens has dtype object; the rule is an integer"),
        ({"weights": np.full((3, 2, 2, 5, 4), "a")}, "weights has dtype <U1; the rule is a float"),
        ({"other": np.zeros(3)}, "other has dtype float64; the rule is no such array"),
        ({"expert_ids": np.asfortranarray(np.zeros((3, 2, 2, 5, 4), np.uint8))}, "in Fortran's order"),
        ({"expert_ids": npy(np.zeros(3, np.uint8)) + b"more"}, "3 bytes, and 7 are there"),
        ({"expert_ids": b"no array"}, "is altered"),
    ],
)
def test_arrays_are_refused_by_their_header(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    blobs = {name: each if isinstance(each, bytes) else npy(each) for name, each in arrays.items()}
    with pytest.raises(ValueError, match=message) as raised:
        RoutingTrace.load(with_arrays(tmp_path / "a.trace", blobs))
    assert "a.trace" in str(raised.value) or "trace of small" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_more_experts_than_any_model_has_are_refused(tmp_path: Path) -> None:
    path = with_arrays(tmp_path / "a.trace", {}, lambda header: header["metadata"].update(num_experts=2 * 10**9))
    with pytest.raises(ValueError, match="num_experts=2000000000 is more than 65535"):
        RoutingTrace.load(path)


def test_what_unpacks_to_a_thousand_times_its_size_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hiermoe.routing.trace_archive._SMALL_BYTES", 2**20)
    size = 2**25
    shape = (3, 2, 2, size // 48, 4)
    head = only_header("|u1", *shape)
    path = with_arrays(tmp_path / "a.trace", {})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name != "expert_ids.npy"}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        with archive.open("expert_ids.npy", "w") as file:
            file.write(head)
            file.write(bytes(int(np.prod(shape))))
    with pytest.raises(ValueError, match=r"expert_ids has shape .*, 0.0 GiB packed into \d+ bytes: no routing"):
        RoutingTrace.load(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_header_without_end_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: int
) -> None:
    monkeypatch.setattr("hiermoe.routing.trace_archive._HEADER_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "a.trace", "w", method) as archive, archive.open("metadata.json", "w") as file:
        for _ in range(128):
            file.write(b" " * 2**20)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.trace: its metadata\.json is larger than 1 MiB"):
        RoutingTrace.load(tmp_path / "a.trace")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 16 * 2**20


def test_trace_larger_than_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_trace().save(tmp_path / "a.trace")
    monkeypatch.setattr("hiermoe.routing.trace_archive.free_bytes", lambda: 100)
    with pytest.raises(ValueError, match=r"expert_ids has shape \(3, 2, 2, 5, 4\), .* GiB are free"):
        RoutingTrace.load(tmp_path / "a.trace")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packed_in_any_usual_way(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(io.BytesIO(saved_bytes())) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "a.trace", "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert_same(RoutingTrace.load(tmp_path / "a.trace"), a_trace())
    _, arrays = read_archive(tmp_path / "a.trace")
    assert all(array.flags.writeable for array in arrays.values())
