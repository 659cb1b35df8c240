"""A trace file gives back what was saved, the same bytes every time, and no damage goes unseen."""

import json
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
