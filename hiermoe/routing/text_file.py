"""Text as people have it: packed by gzip, zstd, xz or bzip2, with a mark of its encoding or without, files merged.

What a file is packed with is told by its first bytes, not by its name. It is unpacked as it is read, never on disk, and
what unpacks to hundreds of times its size is refused.
"""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

BOM = b"\xef\xbb\xbf"  # of UTF-8; where files were merged, at the start of any line

_PART_BYTES = 2**22
_LONGEST_BYTES = 2**30  # of a line; what parses it counts in 32 bits
_SMALL_BYTES, _MOST_TIMES_PACKED = 2**30, 200  # no routing is that empty

_PACKED: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(file, "zstd"),
    b"\xfd7zXZ\x00": lzma.open,
    b"BZh": bz2.open,
}
_ENCODINGS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_OTHERS = {
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PAR1": "a Parquet file, no text",
    b"\x93NUMPY": "a NumPy array, no text",
}


def parts(path: Path) -> Iterator[bytes]:
    """What a text holds, unpacked, part after part of a few megabytes; nothing of an empty file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a folder, damaged, in another encoding than UTF-8, no text, or unpacks to too much.
    """
    if path.is_dir():
        raise ValueError(f"{path}: it is a folder")
    size, total, first = path.stat().st_size, 0, True
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(0)
        opener = next((opener for magic, opener in _PACKED.items() if start.startswith(magic)), None)
        stream = file if opener is None else opener(file)
        while part := _read(path, stream, packed=opener is not None):
            if first:
                _check_text(path, part)
                part, first = part.removeprefix(BOM), False
            total += len(part)
            if opener is not None and total > max(_SMALL_BYTES, _MOST_TIMES_PACKED * size):
                raise ValueError(
                    f"{path}: its {size} bytes unpack to more than {total >> 20} MiB, {_MOST_TIMES_PACKED} times as "
                    "many: no routing is that empty"
                )
            yield part


def beginning(path: Path) -> bytes:
    """The first megabytes of a text, unpacked; nothing of what is no text."""
    try:
        return next(parts(path), b"")
    except ValueError:
        return b""


def line_blocks(path: Path, size: int = 2**26) -> Iterator[tuple[int, bytes]]:
    """Whole lines: the number of the first, from 1, and about ``size`` bytes.

    Raises:
        OSError: as `parts`.
        ValueError: as `parts`, or a line is longer than a gigabyte.
    """
    number, held, length = 1, [], 0
    for part in parts(path):
        held.append(part)
        length += len(part)
        if length < size or b"\n" not in part:
            if length > _LONGEST_BYTES:
                raise ValueError(f"{path}: line {number} or one after it is longer than {_LONGEST_BYTES >> 20} MiB")
            continue
        end = part.rindex(b"\n") + 1
        held[-1] = part[:end]
        block = b"".join(held)
        yield number, _without_marks(block)
        number += block.count(b"\n")
        held, length = [part[end:]], len(part) - end
    if rest := b"".join(held):
        yield number, _without_marks(rest)


def read_text(path: Path, limit: int) -> str:
    """A small text whole.

    Raises:
        OSError: as `parts`.
        ValueError: as `parts`, it is larger than ``limit`` bytes, or no UTF-8.
    """
    held, length = [], 0
    for part in parts(path):
        held.append(part)
        length += len(part)
        if length > limit:
            raise ValueError(f"{path}: it holds more than {limit >> 20} MiB")
    content = _without_marks(b"".join(held))
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line} is not UTF-8; save it as UTF-8") from None


def _read(path: Path, stream: Any, packed: bool) -> bytes:
    """The next part, whole unless it is the last."""
    try:
        return stream.read(_PART_BYTES)
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        if not packed:
            raise
        raise ValueError(
            f"{path}: it is damaged or cut, and cannot be unpacked: {str(error).splitlines()[0]}"
        ) from None


def _check_text(path: Path, part: bytes) -> None:
    """Refuse by name what begins as no UTF-8 text does."""
    found = next((f"{name} text; save it as UTF-8" for mark, name in _ENCODINGS.items() if part.startswith(mark)), None)
    found = found or next((what for magic, what in _OTHERS.items() if part.startswith(magic)), None)
    if found is None and b"\0" in (start := part[:64]):
        half = max(start[::2].count(0), start[1::2].count(0))
        utf16 = half >= len(start) // 2 - 1 and start.count(0) <= half + 1
        found = "UTF-16 text; save it as UTF-8" if utf16 else "no text: it holds zero bytes"
    if part[257:262] == b"ustar":
        found = "a tar archive: unpack it"
    if found:
        raise ValueError(f"{path}: it is {found}")


def _without_marks(block: bytes) -> bytes:
    """Lines without marks of encoding before them."""
    return block.replace(b"\n" + BOM, b"\n").removeprefix(BOM) if BOM in block else block
