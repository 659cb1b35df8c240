"""vLLM's routed_experts: a NumPy array [tokens, layers, K] of expert ids, saved by ``numpy.save``.

vLLM returns ``prompt_routed_experts`` [prompt tokens, MoE layers, K] and ``routed_experts`` [generated tokens, MoE
layers, K], int16 (uint8 in some versions), for every request; concatenate those of all requests along the first axis
before saving. Layers are numbered by their place in the array, from 0 or ``--first-layer``: the array counts MoE layers
and names none.

Tokens of which vLLM knows no routing are -1 throughout; older versions (int32) count all layers and have zeros in dense
ones. Both are left out, and the import says how many. At K = 1 zeros of some tokens may be expert 0: it asks.
"""

from pathlib import Path

import numpy as np

from hiermoe.routing.importers.recording import Recording, Source
from hiermoe.routing.importers.stacked import ArrayFile, Part, from_parts


def recognized(path: Path) -> str | None:
    """What the file is, in words; None where it is of another form."""
    if path.is_dir() or not _starts(path):
        return None
    array = _opened(path)
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.integer):
        return None
    return f"an array of expert ids [tokens, layers, K] = {list(array.shape)}, {array.dtype}"


def read(source: Source) -> Recording:
    """Read the array, a part at a time.

    Raises:
        ValueError: not such an array, truncated, or K is another one than was asked for.
    """
    path = source.path
    notes = "Layers are numbered by place among the array's layers. The order of a token's experts is the array's."
    return from_parts(source, (path,), [Part(str(path), _opened(path))], 0, notes)


def _starts(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6) == b"\x93NUMPY"


def _opened(path: Path) -> np.ndarray | ArrayFile:
    """The array, not yet read."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: it is truncated or no .npy file: {str(error).splitlines()[0]}") from error
    if not isinstance(array, np.memmap):
        raise ValueError(f"{path}: an archive of arrays; the rule is one array [tokens, layers, K]")
    return ArrayFile(path, array) if array.flags.c_contiguous else array  # Fortran's order has no slices of tokens
