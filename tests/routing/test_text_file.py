"""A text comes out as it is whatever it is packed with, and what is no text is named in one line."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiermoe.routing import text_file
from hiermoe.routing.text_file import BOM, line_blocks, parts, read_text


def zstd(content: bytes) -> bytes:
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as file:
        file.write(content)
    return stream.getvalue().to_pybytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "zstd": zstd,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
}
packed = pytest.mark.parametrize("packing", PACKERS)


@packed
@given(lines=st.lists(st.text("09,\r é", max_size=9)), size=st.integers(1, 40), marked=st.booleans())
@settings(max_examples=30, derandomize=True, deadline=None)
def test_lines_come_out_whole_with_their_numbers(packing: str, lines: list[str], size: int, marked: bool) -> None:
    content = "\n".join(lines).encode()
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_file, "_PART_BYTES", 7)
        path = Path(folder) / "named.anyhow"
        path.write_bytes(PACKERS[packing](BOM * marked + content))
        blocks = list(line_blocks(path, size))
        assert b"".join(block for _, block in blocks) == content
        assert read_text(path, 2**20) == content.decode()
    for (number, block), (following, _) in pairwise(blocks):
        assert block.endswith(b"\n") and following == number + block.count(b"\n")
    assert not blocks or blocks[0][0] == 1


@packed
def test_files_that_follow_each_other_are_one_text(packing: str, tmp_path: Path) -> None:
    each = PACKERS[packing](BOM + b"a\n")
    (tmp_path / "merged").write_bytes(each + each)
    assert read_text(tmp_path / "merged", 100) == "a\na\n"
    assert b"".join(block for _, block in line_blocks(tmp_path / "merged", 1)) == b"a\na\n"


@pytest.mark.parametrize("packing", [name for name in PACKERS if name != "plain"])
@given(share=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(max_examples=30, derandomize=True, deadline=None)
def test_damaged_and_cut_files_are_named_in_a_line(packing: str, share: float, flip: int) -> None:
    whole = PACKERS[packing](b"".join(b"%d,%d\n" % (i, i * i) for i in range(300)))
    altered = bytearray(whole)
    altered[int(share * len(whole))] ^= flip
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        cut = whole[: max(9, int(share * len(whole)))]
        for content in (cut,) if packing == "zstd" else (cut, bytes(altered)):  # Arrow writes zstd without checksums
            path.write_bytes(content)
            try:
                found = b"".join(parts(path))
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            else:  # its first bytes say no packing any more, or the change is in what says nothing
                assert content[:3] != whole[:3] or found == b"".join(b"%d,%d\n" % (i, i * i) for i in range(300))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("expert,load\n0,1\n".encode("utf-16"), "it is UTF-16 text; save it as UTF-8"),
        ("expert,load\n0,1\n".encode("utf-16-be"), "it is UTF-16 text; save it as UTF-8"),
        ("expert,load\n0,1\n".encode("utf-16-le"), "it is UTF-16 text; save it as UTF-8"),
        (gzip.compress("expert,load\n0,1\n".encode("utf-16"), mtime=0), "it is UTF-16 text; save it as UTF-8"),
        ("expert,load\n0,1\n".encode("utf-32"), "it is UTF-32 text; save it as UTF-8"),
        (b"\0" * 100, "it is no text: it holds zero bytes"),
        (b"PK\x03\x04and so on", "it is a zip archive: unpack it"),
        (gzip.compress(b"name".ljust(257, b"\0") + b"ustar" + bytes(250), mtime=0), "it is a tar archive: unpack it"),
        (b"\x93NUMPY\x01\x00", "it is a NumPy array, no text"),
        ("expert,load\n0,1\ngrün".encode("latin-1"), "line 3 is not UTF-8; save it as UTF-8"),
    ],
)
def test_what_is_no_utf8_text_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read_text(tmp_path / "a.csv", 2**20)
    assert message in str(raised.value) and "a.csv" in str(raised.value)


def test_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it is a folder"):
        list(parts(tmp_path))


@pytest.mark.parametrize("packing", ["xz", "bzip2", "zstd", "gzip"])
def test_what_unpacks_to_hundreds_of_times_its_size_is_left_early(
    packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_file, "_SMALL_BYTES", 2**20)
    monkeypatch.setattr(text_file, "_MOST_TIMES_PACKED", 500)
    (tmp_path / "bomb").write_bytes(PACKERS[packing](b"0,0\n" * 2**21))
    with pytest.raises(ValueError, match=r"bomb: its \d+ bytes unpack to more than \d+ MiB, 500 times as many"):
        for _ in line_blocks(tmp_path / "bomb"):
            pass


def test_line_without_end_is_left_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_file, "_LONGEST_BYTES", 2**20)
    (tmp_path / "long").write_bytes(b"1\n" + b"1" * 2**23)
    with pytest.raises(ValueError, match="line 2 or one after it is longer than 1 MiB"):
        list(line_blocks(tmp_path / "long", 100))


def test_text_larger_than_it_may_be_is_left_early(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"1\n" * 2**21)
    with pytest.raises(ValueError, match="it holds more than 1 MiB"):
        read_text(tmp_path / "large", 2**20)
