"""The file of a trace: a zip of .npy arrays and a header with their checksums.

A file may come from anywhere. What its header says of types, shapes and sizes is checked before memory is taken, and
what is unpacked never outgrows it.
"""

import bz2
import copy
import hashlib
import io
import json
import lzma
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from hiermoe.records.free_memory import free_bytes
from hiermoe.records.whole_file import whole

FORMAT = 1
HEADER = "metadata.json"
KINDS = {"expert_ids": ("iu", "an integer"), "num_tokens": ("iu", "an integer"), "weights": ("f", "a float")}

# Routing repeats itself far apart, so LZMA makes it a seventh smaller than bzip2, at 2 MB/s. What is larger than any
# trace that is shipped is packed by deflate, 17 times as fast and a tenth larger on those that are.
_SMALL_METHOD, _LARGE_METHOD, _LARGE_BYTES = zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED, 2**24
_HEADER_BYTES = 2**26  # a million iterations state their steps and losses in half of that
_PART_BYTES = 2**22
# Recorded routing packs to a half or a tenth, padding to nearly nothing; what is larger and emptier than this is none.
_SMALL_BYTES, _MOST_TIMES_PACKED = 2**28, 1000


def write_archive(path: Path, metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write a file that ``numpy.load`` reads; the same content gives the same bytes. No array is held twice."""
    header = {
        "format": FORMAT,
        "sha256": {name: _checksum(array) for name, array in arrays.items()},
        "metadata": metadata,
    }
    with whole(path) as partial, zipfile.ZipFile(partial, "w", _SMALL_METHOD) as archive:
        archive.writestr(zipfile.ZipInfo(HEADER), json.dumps(header, indent=1))
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")  # a fixed date
            info.compress_type = _SMALL_METHOD if array.nbytes < _LARGE_BYTES else _LARGE_METHOD
            with archive.open(info, "w", force_zip64=array.nbytes >= _LARGE_BYTES) as file:
                _write_npy(file.write, array)


def read_archive(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The metadata as stated, and the arrays, whose checksums match.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, altered, of another format, or too large for this machine.
    """
    if not path.exists():
        raise FileNotFoundError(f"no trace at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            with _opened(archive, HEADER) as file:
                content = file.read(_HEADER_BYTES + 1)
            if len(content) > _HEADER_BYTES:
                raise _Refused(f"its {HEADER} is larger than {_HEADER_BYTES >> 20} MiB")
            header = json.loads(content)
            if header["format"] != FORMAT:  # another one may be laid out in any way
                raise _Refused(f"it has format {str(header['format'])[:20]}, this version reads {FORMAT}")
            checksums, stated = dict(header["sha256"]), dict(header["metadata"])
            arrays = {
                name: _read_array(archive, name, checksums.get(name))
                for name in ("expert_ids", "num_tokens", *(set(checksums) - {"expert_ids", "num_tokens"}))
            }
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except (zipfile.BadZipFile, KeyError, EOFError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is truncated or not a trace: {error}") from error
    except Exception as error:  # bz2, zlib and numpy raise their own kinds on altered bytes
        raise ValueError(f"{path} is altered: {(str(error) or repr(error)).splitlines()[0]}") from error
    return stated, arrays


class _Refused(Exception):
    """A whole file that is not read, and why."""


def _opened(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A member, unpacked in parts of the size that is asked for."""
    info = archive.getinfo(name)
    if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return archive.open(info)
    # zipfile unpacks all that some kilobytes of these hold at once, which may be gigabytes; their modules stop where
    # they are told.
    packed = copy.copy(info)
    packed.compress_type, packed.file_size, packed.CRC = zipfile.ZIP_STORED, info.compress_size, None  # type: ignore[assignment]
    if info.compress_type == zipfile.ZIP_BZIP2:
        return bz2.open(archive.open(packed))
    if info.compress_type == zipfile.ZIP_LZMA:
        content = archive.open(packed).read()
        start = 4 + int.from_bytes(content[2:4], "little")  # two bytes of version, as many of what follows: properties
        alone = content[4:start] + b"\xff" * 8 + content[start:]  # size unknown: there is a mark at the end
        return lzma.open(io.BytesIO(alone), format=lzma.FORMAT_ALONE)
    raise _Refused(f"{name} is packed by method {info.compress_type}; the rule is LZMA, bzip2, deflate or none")


def _read_array(archive: zipfile.ZipFile, name: str, checksum: object) -> np.ndarray:
    """An array of the file."""
    info = archive.getinfo(f"{name}.npy")
    with _opened(archive, info.filename) as file:
        start = io.BytesIO(file.read(np.lib.format.MAGIC_LEN + 4 + 10_000))  # numpy's own limit of a header
        dtype, shape = _checked_header(name, start)
        size = dtype.itemsize * math.prod(shape)
        if start.tell() + size != info.file_size:
            raise _Refused(f"{name} has shape {shape}, {size} bytes, and {info.file_size - start.tell()} are there")
        if size > _SMALL_BYTES and size > _MOST_TIMES_PACKED * info.compress_size:
            raise _Refused(
                f"{name} has shape {shape}, {size / 2**30:.1f} GiB packed into {info.compress_size} bytes: no routing "
                "is that empty"
            )
        if 2 * size > (free := free_bytes()):  # checking takes as much again
            raise _Refused(f"{name} has shape {shape}, {size / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free")
        digest, buffer = hashlib.sha256(start.getvalue()), np.empty(size, np.uint8)
        part, at = start.read(), 0
        while part and at + len(part) <= size:
            buffer[at : at + len(part)] = np.frombuffer(part, np.uint8)
            at += len(part)
            part = file.read(_PART_BYTES)
            digest.update(part)
    if at != size or part or digest.hexdigest() != checksum:
        raise ValueError(f"checksum of {name} does not match")
    return buffer.view(dtype).reshape(shape)


def _checked_header(name: str, file: io.BytesIO) -> tuple[np.dtype, tuple[int, ...]]:
    """What an array's header says, and the file after it."""
    if np.lib.format.read_magic(file) == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
    kinds, rule = KINDS.get(name, ("", "no such array"))
    if dtype.kind not in kinds or not kinds:
        raise _Refused(f"{name} has dtype {dtype}; the rule is {rule}")
    if fortran_order and len(shape) > 1:
        raise _Refused(f"{name} is in Fortran's order; the rule is C's")
    return dtype, shape


def _checksum(array: np.ndarray) -> str:
    digest = hashlib.sha256()
    _write_npy(digest.update, array)
    return digest.hexdigest()


def _write_npy(write: Callable[[bytes | memoryview], object], array: np.ndarray) -> None:
    """What ``numpy.save`` writes, in parts."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    write(header.getvalue())
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    for start in range(0, len(content), _PART_BYTES):
        write(content[start : start + _PART_BYTES])
