"""What every importer hands over, and how it becomes a trace."""

import hashlib
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa

from hiermoe.routing.trace import RoutingTrace, TraceMetadata, has_twice

CHUNK_TOKENS = 2**20  # what is checked at once: temporaries stay below a hundred megabytes


@dataclass(frozen=True)
class Source:
    """What to import.

    Attributes:
        path: a file, or a folder of files where the format has one a rank or one a layer.
        layers: layers to keep, numbered as in the file; None for all.
        topk: K; None to take it from the file where the file says it.
        ranks: G that the tokens are laid out over; None for what the file says, else 1.
        tokens_per_rank: T of an iteration; None for one iteration of all tokens.
        max_tokens: use only so many tokens, the first ones; None for all.
    """

    path: Path
    layers: tuple[int, ...] | None = None
    topk: int | None = None
    ranks: int | None = None
    tokens_per_rank: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("topk", "ranks", "tokens_per_rank", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: there is no such file or folder")

    def wants(self, layer: int) -> bool:
        """Whether the layer is among those to keep."""
        return self.layers is None or layer in self.layers

    def files(self, pattern: str) -> list[Path]:
        """The file itself, or those of the folder whose names match, in order of name.

        Raises:
            ValueError: the folder has none.
        """
        if not self.path.is_dir():
            return [self.path]
        found = sorted(self.path.glob(pattern))
        if not found:
            raise ValueError(f"{self.path}: no file in this folder is named {pattern}")
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
        num_tokens: int [iteration, rank], where the file says who held which token; None where it does not.
        steps: the file's step of each iteration; None where it has none.
        files: that were read.
        where: for a layer and a row of its ids, the place in the file, for error messages.
        notes: what the file does not say, or what was left out, in sentences.
    """

    ids: Mapping[int, np.ndarray]
    files: tuple[Path, ...]
    where: Callable[[int, int], str]
    notes: str
    num_tokens: np.ndarray | None = None
    steps: tuple[int, ...] | None = None


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
    """Expert ids as uint16.

    Args:
        ids: integer [N, K].
        where: place of a row, for the message.

    Raises:
        ValueError: an id that no model has.
    """
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) > np.iinfo(np.uint16).max):
        row = int(np.argmax(((ids < 0) | (ids > np.iinfo(np.uint16).max)).any(axis=1)))
        raise ValueError(f"{where(row)}: expert ids {ids[row].tolist()} are outside 0..65535")
    return ids.astype(np.uint16)


def check_experts(recording: Recording, num_experts: int) -> None:
    """Every id below E, no expert twice in a token.

    Raises:
        ValueError: with the place of the first token that breaks a rule.
    """
    for layer, ids_NK in recording.ids.items():
        for start in range(0, len(ids_NK), CHUNK_TOKENS):
            chunk = ids_NK[start : start + CHUNK_TOKENS]
            if int(chunk.max()) >= num_experts:
                row = int(np.argmax((chunk >= num_experts).any(axis=1)))
                rule = f"expert {int(chunk[row].max())} is outside 0..{num_experts - 1} (num_experts={num_experts})"
                raise ValueError(f"{recording.where(layer, start + row)}: {rule}")
            if (twice := has_twice(chunk)).any():
                row = int(np.argmax(twice))
                place = recording.where(layer, start + row)
                raise ValueError(f"{place}: a token has an expert twice, {chunk[row].tolist()}")


def known_experts(recording: Recording, num_experts: int | str | None, ranks: int) -> int:
    """E.

    Args:
        recording: what was read.
        num_experts: E; "infer" for the largest id + 1, rounded up to a multiple of ``ranks``; None is refused, because
            an expert that was never chosen is in no file.
        ranks: G.

    Raises:
        ValueError: None was given.
    """
    if isinstance(num_experts, int):
        return num_experts
    largest = max(int(ids.max()) for ids in recording.ids.values())
    if num_experts is None:
        raise ValueError(
            f"{recording.files[0]}: the format does not say how many experts there are, the largest id is {largest}; "
            "give --num-experts N (or --num-experts infer: the largest id + 1, rounded up to a multiple of the ranks)"
        )
    return -(-(largest + 1) // ranks) * ranks


def to_trace(
    recording: Recording, source: Source, importer: str, model: str, num_experts: int | str | None, command: str
) -> RoutingTrace:
    """Check a recording, lay it out over ranks, and say how it came to be.

    Args:
        recording: what was read.
        source: what was asked for.
        importer: name of the format.
        model: name of the model, as the trace will state it.
        num_experts: see `known_experts`.
        command: how it was called.

    Raises:
        ValueError: experts out of range or twice, or tokens that do not divide over ranks.
    """
    if not recording.ids or not all(len(ids) for ids in recording.ids.values()):
        raise ValueError(f"{source.path}: it has no tokens")
    num_tokens = _layout(recording, source)
    iterations, ranks = num_tokens.shape
    experts = known_experts(recording, num_experts, ranks)
    check_experts(recording, experts)
    layers = sorted(recording.ids)
    topk = recording.ids[layers[0]].shape[1]
    dtype = np.min_scalar_type(experts - 1)
    expert_ids = np.zeros((iterations, len(layers), ranks, int(num_tokens.max()), topk), dtype)
    for position, layer in enumerate(layers):
        out_IRTK, ids_NK = expert_ids[:, position], recording.ids[layer]
        if ids_NK.size == out_IRTK.size:
            out_IRTK[:] = ids_NK.reshape(out_IRTK.shape)
        else:
            out_IRTK[np.arange(out_IRTK.shape[2]) < num_tokens[:, :, None]] = ids_NK
    inferred = "" if isinstance(num_experts, int) else f" num_experts={experts} was inferred from the largest id."
    unsaid = "" if recording.steps is not None else " training_step counts iterations of the import, not of a training."
    return RoutingTrace(
        expert_ids=expert_ids,
        num_tokens=num_tokens.astype(np.int32),
        metadata=TraceMetadata(
            model=model,
            num_experts=experts,
            topk=topk,
            num_recorded=topk,
            router="unknown",
            corpus="unknown",
            vocabulary=None,
            seed=None,
            training_step=list(recording.steps or range(iterations)),
            loss=[None] * iterations,
            layers=layers,
            how_made=command,
            versions={"python": platform.python_version(), **{name: version(name) for name in ("numpy", "pyarrow")}},
            notes=(
                f"Imported by the importer {importer} from {_named(recording.files)}. Router, corpus, vocabulary, seed "
                f"and loss are unknown: the format has none of them.{unsaid}{inferred} {recording.notes}"
            ).strip(),
        ),
    )


def _layout(recording: Recording, source: Source) -> np.ndarray:
    """Tokens of every (iteration, rank)."""
    count = len(next(iter(recording.ids.values())))
    if recording.num_tokens is not None:
        given = recording.num_tokens
        if source.ranks is not None and source.ranks != given.shape[1]:
            raise ValueError(
                f"{source.path}: it has {given.shape[1]} ranks, ranks={source.ranks} does not fit; "
                "a run regroups the tokens of a trace over its own ranks"
            )
        if source.tokens_per_rank is not None or source.max_tokens is not None:
            raise ValueError(f"{source.path}: it says who held which token; leave tokens and tokens_per_rank out")
        return given
    ranks = source.ranks or 1
    tokens = source.tokens_per_rank or count // ranks
    per_iteration = ranks * tokens
    if per_iteration == 0 or count % per_iteration:
        rule = f"ranks={ranks}" + (f" x tokens_per_rank={tokens}" if source.tokens_per_rank else "")
        unit = per_iteration if source.tokens_per_rank else ranks
        hint = f"; give --tokens {count // unit * unit} to leave the rest out" if count >= unit else ""
        raise ValueError(f"{source.path}: {count} tokens do not divide over {rule}{hint}")
    return np.full((count // per_iteration, ranks), tokens)


def _named(files: tuple[Path, ...]) -> str:
    """Names and hashes of files."""
    parts = []
    for path in files:
        with path.open("rb") as file:
            parts.append(f"{path.name} (sha256 {hashlib.file_digest(file, 'sha256').hexdigest()})")
    return ", ".join(parts)
