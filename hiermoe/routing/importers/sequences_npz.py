"""An archive .npz of ``ids`` [tokens, layers, K] and ``seq_len``, the lengths of the sequences in their order.

Layers are numbered by their place, from 0 or ``--first-layer``: DeepSeek-V2-Lite's 26 MoE layers are 2 to 27, counted
from 1 with the dense first one. ``seq_len`` may be missing; where it is there, it must sum up to the tokens.
"""

import zipfile
from pathlib import Path

import numpy as np

from hiermoe.records.free_memory import free_bytes
from hiermoe.routing.importers.recording import Recording, Source
from hiermoe.routing.importers.stacked import Part, from_parts

_SMALL_BYTES, _MOST_TIMES_PACKED = 2**28, 200  # no routing is that empty


def recognized(path: Path) -> str | None:
    """What the file is, in words; None where it is of another form."""
    if path.is_dir() or not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except zipfile.BadZipFile:
        return None
    return f"an archive of {', '.join(sorted(names))}" if "ids.npy" in names else None


def read(source: Source) -> Recording:
    """Read the arrays.

    Raises:
        ValueError: not such an archive, truncated, or what it says of itself does not fit.
    """
    path = source.path
    try:
        with zipfile.ZipFile(path) as archive:
            there = archive.namelist()
            if "ids.npy" not in there:
                raise _Refused(f"it has no array ids; it has {sorted(there)[:8]}")
            ids = _array(archive, "ids.npy", path.stat().st_size)
            lengths = _array(archive, "seq_len.npy", path.stat().st_size) if "seq_len.npy" in there else None
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # zlib, zipfile and numpy raise their own kinds on altered bytes
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{path}: it is truncated or no archive of arrays: {reason}") from error
    said = ""
    if lengths is not None:
        if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer) or (lengths < 0).any():
            raise ValueError(
                f"{path}: seq_len is {lengths.dtype} {lengths.shape}; the rule is integers >= 0 [sequences]"
            )
        if int(lengths.sum()) != len(ids):
            raise ValueError(f"{path}: seq_len sums up to {int(lengths.sum())}, ids has {len(ids)} tokens")
        said = f" Sequences: {len(lengths)}."
    return from_parts(source, (path,), [Part(str(path), ids)], 0, f"Layers are numbered by their place in ids.{said}")


class _Refused(Exception):
    """A whole file that is not read, and why."""


def _array(archive: zipfile.ZipFile, name: str, packed: int) -> np.ndarray:
    """An array whose header was checked before memory is taken."""
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _Refused(f"{name} is packed by method {info.compress_type}; the rule is deflate or none")
    size = info.file_size
    if size > _SMALL_BYTES and size > _MOST_TIMES_PACKED * packed:
        raise _Refused(f"{name} says {size >> 20} MiB in a file of {packed} bytes: no routing is that empty")
    if 2 * size > free_bytes():
        raise _Refused(f"{name} has {size / 2**30:.1f} GiB; {free_bytes() / 2**30:.1f} GiB are free")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = header[version](file)
        wanted = dtype.itemsize
        for length in shape:
            wanted *= length
        if dtype.hasobject or file.tell() + wanted != size:
            raise _Refused(f"{name} has dtype {dtype}, shape {shape} and {size - file.tell()} bytes: they do not fit")
        return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran_order else "C")
