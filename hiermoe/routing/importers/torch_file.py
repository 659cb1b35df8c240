"""Files of torch.save, read without executing anything: tensors, and arrays of NumPy inside lists and dicts.

A file may come from anywhere. It is a zip whose members are not packed, so nothing unpacks to more than it has; tensors
are mapped, not read; and what is taken as arrays never adds up to more than the file holds, whatever refers to what.
"""

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hiermoe.records.free_memory import free_bytes

_SMALL_BYTES, _TIMES_AS_OBJECTS = 2**24, 8  # of the pickle; a number is one byte there and eight in a list
_NUMBERS = (
    "Bool",
    "Int8",
    "UInt8",
    "Int16",
    "UInt16",
    "Int32",
    "UInt32",
    "Int64",
    "UInt64",
    "Float16",
    "Float32",
    "Float64",
)


@dataclass
class TorchFile:
    """An opened file.

    Attributes:
        path: of it.
        content: as saved; tensors are mapped.
        left: bytes of arrays that may still be taken.
    """

    path: Path
    content: Any
    left: int = field(repr=False)

    def array(self, value: object, where: str, kind: str, axes: int) -> np.ndarray:
        """A tensor or array as an array that is not copied.

        Args:
            value: what the file has there.
            where: it stands, for messages.
            kind: "integer" or "float".
            axes: how many it must have.

        Raises:
            ValueError: it is neither, of another type or number of axes, or larger than what the file holds.
        """
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind in "iuf" else value
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{where}: {type(value).__name__}; the rule is a tensor or array of {kind}s")
        if tensor.dtype.is_complex or tensor.dtype == torch.bool or tensor.is_floating_point() != (kind == "float"):
            raise ValueError(f"{where}: dtype {str(tensor.dtype).removeprefix('torch.')}; the rule is {kind}s")
        if tensor.dim() != axes:
            raise ValueError(f"{where}: shape {list(tensor.shape)}; the rule is {axes} axes")
        self.left -= tensor.numel() * tensor.element_size()
        if self.left < 0:
            raise ValueError(f"{where}: shape {list(tensor.shape)}: the file has not as many numbers as it refers to")
        tensor = tensor.detach()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def opened(path: Path) -> TorchFile:
    """What a file holds.

    Raises:
        ValueError: no file of torch.save, truncated, altered, or it holds more than numbers, texts, lists and dicts.
    """
    size = path.stat().st_size
    if not looks_saved(path):
        raise ValueError(f"{path}: it is truncated or no file of torch.save")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if any(each.compress_type != zipfile.ZIP_STORED for each in members) or _sum(members) > size:
            raise ValueError("its members are packed or overlap, which torch.save never does")
        pickled = max(each.file_size for each in members if each.filename.endswith("/data.pkl"))
        if pickled > _SMALL_BYTES and _TIMES_AS_OBJECTS * pickled > free_bytes():
            raise ValueError(f"{pickled >> 20} MiB of it are no tensors; {free_bytes() / 2**30:.1f} GiB are free")
        with torch.serialization.safe_globals(_numpy_names()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zipfile and torch raise their own kinds on altered bytes
        raise ValueError(f"{path}: it is not read: {_first_sentence(error)}") from None
    return TorchFile(path, content, size)


def looks_saved(path: Path) -> bool:
    """Whether it is a zip with a pickle, as torch.save writes it."""
    if path.is_dir() or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def content_of(path: Path) -> Any:
    """What a file holds, to see what it is; None where it is no file of torch.save that can be read."""
    try:
        return opened(path).content if looks_saved(path) else None
    except ValueError:
        return None


def _sum(members: list[zipfile.ZipInfo]) -> int:
    return sum(each.file_size for each in members)


def _numpy_names() -> list[Any]:
    """What arrays of numbers are made of in a pickle, under the names of NumPy 1 and 2."""
    made = [(_empty, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    kinds = [type(np.dtype(name.lower())) for name in _NUMBERS]
    return [*made, (np.ndarray, "numpy.ndarray"), (np.dtype, "numpy.dtype"), *kinds]


def _empty(kind: type, shape: tuple[int, ...], _code: bytes) -> np.ndarray:
    """The array that a pickle fills; it never asks for memory of its own."""
    if kind is not np.ndarray or tuple(shape) != (0,):
        raise ValueError(f"an array of {kind.__name__} {shape} before its numbers")
    return np.empty(0, np.int8)


def _first_sentence(error: Exception) -> str:
    """Of a message that torch makes long: what was found, without advice to read it unsafely."""
    text = str(error) or repr(error)
    for mark in ("Unsupported", "WeightsUnpickler error: "):
        if mark in text:
            found = text[text.index(mark) :].splitlines()[0].split(" was not an allowed")[0]
            return f"it holds more than numbers, texts, lists and dicts ({found[:120]})"
    return text.splitlines()[0][:200]
