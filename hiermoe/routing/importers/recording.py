"""What every importer hands over, and what all of them do to lists of experts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

NO_EXPERT = np.iinfo(np.uint16).max  # where a file says -1
CHUNK_TOKENS = 2**20  # what is checked at once: temporaries stay below a hundred megabytes


@dataclass(frozen=True)
class Source:
    """What to import.

    Attributes:
        path: a file, or a folder of files where the format has one a rank or one a layer.
        layers: layers to keep, numbered as the trace has them; None for all.
        topk: K; None to take it from the file where the file says it.
        ranks: G that the tokens are laid out over; None for what the file says, else 1.
        tokens_per_rank: T of an iteration; None for one iteration of all tokens.
        max_tokens: use only so many tokens, the first ones; None for all.
        pipeline: stages of a pipeline that the file's ranks are of, where layers count within a stage; None if unknown.
        chunks: parts of the model that a stage has in turn (an interleaved pipeline); None if unknown.
        first_layer: number of the first layer, where the form counts layers by place alone; None if unknown.
        zeros: what zeros are at K = 1 where a form has them for tokens without routing; None if unknown.
    """

    path: Path
    layers: tuple[int, ...] | None = None
    topk: int | None = None
    ranks: int | None = None
    tokens_per_rank: int | None = None
    max_tokens: int | None = None
    pipeline: int | None = None
    chunks: int | None = None
    first_layer: int | None = None
    zeros: Literal["expert", "none"] | None = None

    def __post_init__(self) -> None:
        for name in ("topk", "ranks", "tokens_per_rank", "max_tokens", "pipeline", "chunks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.first_layer is not None and self.first_layer < 0:
            raise ValueError(f"first_layer={self.first_layer} must be at least 0")
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: there is no such file or folder")

    def wants(self, layer: int) -> bool:
        """Whether the layer is among those to keep."""
        return self.layers is None or layer in self.layers

    def files(self, *patterns: str) -> list[Path]:
        """The file itself, or those of the folder whose names match one of the patterns, in order of name.

        Raises:
            ValueError: the folder has none.
        """
        if not self.path.is_dir():
            return [self.path]
        found = sorted({file for pattern in patterns for file in self.path.glob(pattern)})
        if not found:
            raise ValueError(f"{self.path}: no file in this folder is named {patterns[0]}")
        return found

    def kept(self, found: Iterable[int]) -> list[int]:
        """The layers to keep, in rising order.

        Raises:
            ValueError: one that was asked for is not in the file.
        """
        there = sorted(set(found))
        missing = sorted(set(self.layers or ()) - set(there))
        if missing:
            raise ValueError(f"{self.path}: layer {missing[0]} is not in it; it has {there}")
        return there if self.layers is None else sorted(set(self.layers))


@dataclass(frozen=True)
class Recording:
    """Expert choices as a file has them.

    Attributes:
        ids: for each layer uint16 [N, K], tokens iteration after iteration, rank after rank; all layers of equal N.
            NO_EXPERT where the file says -1. Whoever goes on with them takes them out.
        num_tokens: int [iteration, rank], where the file says who held which token; None where it does not.
        steps: the file's step of each iteration; None where it has none.
        files: that were read.
        where: for a layer and a row of its ids, the place in the file, for error messages.
        notes: what the file does not say, in sentences.
        left_out: what of the file was not taken, and why; to be told to whoever imports it.
        filled_with_zeros: whether the form has zeros where it knows no routing.
        num_experts: E, where the file says it.
    """

    ids: dict[int, np.ndarray]
    files: tuple[Path, ...]
    where: Callable[[int, int], str]
    notes: str
    num_tokens: np.ndarray | None = None
    steps: tuple[int, ...] | None = None
    left_out: tuple[str, ...] = ()
    filled_with_zeros: bool = False
    num_experts: int | None = None


def from_lists(lists: pa.Array, topk: int | None, where: Callable[[int], str]) -> np.ndarray:
    """A column of lists as expert ids: uint16 [R, K].

    Args:
        lists: of integers, a row a token.
        topk: K; None for the length of the first row.
        where: place of a row, for messages.

    Raises:
        ValueError: a row or an expert is null, a row has another length, or an id that no model has.
    """
    if lists.null_count:
        raise ValueError(f"{where(first_true(lists.is_null()))} has no indices")
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    topk = topk or int(lengths[0])
    if topk == 0 or (lengths != topk).any():
        row = int(np.argmax(lengths != topk))
        raise ValueError(f"{where(row)} has {int(lengths[row])} experts, topk={topk}")
    values = lists.flatten()
    if values.null_count:
        raise ValueError(f"{where(first_true(values.is_null()) // topk)} has an expert that is null")
    return narrowed(values.to_numpy(zero_copy_only=False).reshape(-1, topk), where)


def first_true(mask: pa.Array) -> int:
    """Place of the first true entry."""
    return int(np.argmax(mask.to_numpy(zero_copy_only=False)))


def narrowed(ids: np.ndarray, where: Callable[[int], str]) -> np.ndarray:
    """Expert ids as uint16, -1 as NO_EXPERT.

    Args:
        ids: integer [N, K].
        where: place of a row, for the message.

    Raises:
        ValueError: an id that no model has.
    """
    if not ids.size:
        return ids.astype(np.uint16)
    lowest, most = int(ids.min()), NO_EXPERT - 1
    if lowest < -1 or int(ids.max()) > most:
        row = int(np.argmax(((ids < -1) | (ids > most)).any(axis=1)))
        raise ValueError(f"{where(row)}: expert ids {ids[row].tolist()} are outside 0..{most}")
    return ids.astype(np.uint16)  # which makes NO_EXPERT of -1
