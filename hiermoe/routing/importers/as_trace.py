"""How what an importer has read becomes a trace: checked, laid out over ranks, with a word on where it is from."""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np

from hiermoe.routing.importers.recording import CHUNK_TOKENS, Recording, Source
from hiermoe.routing.importers.unrouted import without_unrouted
from hiermoe.routing.trace import RoutingTrace, TraceMetadata, has_twice

MOST_NAMED = 64  # files with a hash of their own in a trace's notes


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
        num_experts: E; "infer" for the largest id + 1, rounded up to a multiple of ``ranks``; None for what the file
            says, and refused where it says nothing, because an expert that was never chosen is in no file.
        ranks: G.

    Raises:
        ValueError: None was given and the file does not say it, or it says another one.
    """
    if (said := recording.num_experts) is not None:
        if isinstance(num_experts, int) and num_experts != said:
            raise ValueError(f"{recording.files[0]}: it has num_experts={said}, num_experts={num_experts} does not fit")
        return said
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
    """Check a recording, lay it out over ranks, and say how it came to be. Takes its layers out, one after another.

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
    recording = without_unrouted(recording, source)
    num_tokens = _layout(recording, source)
    iterations, ranks = num_tokens.shape
    experts = known_experts(recording, num_experts, ranks)
    check_experts(recording, experts)
    layers = sorted(recording.ids)
    topk = recording.ids[layers[0]].shape[1]
    dtype = np.min_scalar_type(experts - 1)
    expert_ids = np.zeros((iterations, len(layers), ranks, int(num_tokens.max()), topk), dtype)
    for position, layer in enumerate(layers):
        out_IRTK, ids_NK = expert_ids[:, position], recording.ids.pop(layer)
        if ids_NK.size == out_IRTK.size:
            out_IRTK[:] = ids_NK.reshape(out_IRTK.shape)
        else:
            out_IRTK[np.arange(out_IRTK.shape[2]) < num_tokens[:, :, None]] = ids_NK
    stated = recording.num_experts is not None or isinstance(num_experts, int)
    inferred = "" if stated else f" num_experts={experts} was inferred from the largest id."
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
            left_out=recording.left_out,
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
    """Names and hashes of files; many files have one hash, of their hashes in order."""
    hashes = []
    for path in files:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(files) > MOST_NAMED:
        together = hashlib.sha256("".join(hashes).encode()).hexdigest()
        return f"{len(files)} files, {files[0].name} to {files[-1].name} (sha256 of their sha256s {together})"
    return ", ".join(f"{path.name} (sha256 {each})" for path, each in zip(files, hashes, strict=True))
