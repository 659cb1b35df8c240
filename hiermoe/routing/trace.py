"""Recorded routing: what a model's routers chose, step after step, in one compact, checked file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import model_validator

from hiermoe.records.choices import or_else, unknown
from hiermoe.records.project import PUBLIC, TRACES, find_file, shown
from hiermoe.records.status import NotApplicable
from hiermoe.records.strict import Strict, checked
from hiermoe.routing.step import RoutingRequest, RoutingStep, make_step
from hiermoe.routing.trace_archive import read_archive, write_archive

MOST_EXPERTS = 2**16 - 1  # of a layer; no model has as many, and tables over experts are made of them

_CHECKED_TOKENS = 2**20  # of all layers together, looked at at once: temporaries stay below a hundred megabytes


class TraceMetadata(Strict):
    """How a trace came to be. Whoever records it states every field; None is what an imported file does not say."""

    model: str
    num_experts: int
    topk: int  # K that the router was trained with
    num_recorded: int  # experts stored per token; the first K are the router's choice
    router: str
    corpus: str
    vocabulary: int | None
    seed: int | None
    training_step: list[int]  # of each iteration
    loss: list[float | None]  # of each iteration
    layers: list[int]  # model layer of each recorded layer
    how_made: str  # the command
    versions: dict[str, str]
    notes: str = ""
    left_out: tuple[str, ...] = ()  # of an imported file, and why

    @model_validator(mode="after")
    def _experts_are_enough(self) -> "TraceMetadata":
        if not 1 <= self.topk <= self.num_recorded <= self.num_experts:
            raise ValueError(
                f"topk={self.topk}, num_recorded={self.num_recorded}, num_experts={self.num_experts}: "
                "the rule is 1 <= topk <= num_recorded <= num_experts"
            )
        if self.num_experts > MOST_EXPERTS:
            raise ValueError(f"num_experts={self.num_experts} is more than {MOST_EXPERTS}")
        return self


@dataclass(frozen=True)
class RoutingTrace:
    """Expert choices [iteration, layer, rank, T, k] of a training run.

    Attributes:
        expert_ids: unsigned integer [iteration, layer, rank, T, k], by falling router score; rows past
            ``num_tokens`` are padding.
        num_tokens: int32 [iteration, rank].
        metadata: how the trace was made.
        weights: optional float16, same shape as ``expert_ids``: routing weight of each choice.

    Raises:
        ValueError: where shapes, ranges or metadata do not fit, or a token names an expert twice.
    """

    expert_ids: np.ndarray
    num_tokens: np.ndarray
    metadata: TraceMetadata
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        ids, counts, meta = self.expert_ids, self.num_tokens, self.metadata
        if ids.ndim != 5:
            raise ValueError(f"expert_ids has {ids.ndim} axes; the rule is [iteration, layer, rank, T, k]")
        if not np.issubdtype(counts.dtype, np.integer):
            raise ValueError(f"num_tokens has dtype {counts.dtype}; the rule is an integer")
        object.__setattr__(self, "expert_ids", np.ascontiguousarray(ids, dtype=_smallest_dtype(meta.num_experts, ids)))
        iterations, layers, ranks, tokens, recorded = ids.shape
        rules = {
            f"num_tokens has shape {counts.shape}, expert_ids asks for {(iterations, ranks)}": counts.shape
            == (iterations, ranks),
            f"num_tokens outside 0..{tokens}": counts.size > 0 and counts.min() >= 0 and counts.max() <= tokens,
            f"expert_ids stores {recorded} experts per token, metadata says {meta.num_recorded}": recorded
            == meta.num_recorded,
            f"metadata names {len(meta.layers)} layers, expert_ids has {layers}": layers == len(meta.layers),
            f"metadata has {len(meta.training_step)} training steps and {len(meta.loss)} losses for {iterations} "
            "iterations": len(meta.training_step) == len(meta.loss) == iterations,
            "weights must have the shape of expert_ids": self.weights is None or self.weights.shape == ids.shape,
        }
        for message, holds in rules.items():
            if not holds:
                raise ValueError(f"trace of {meta.model}: {message}")
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Range and distinctness of every token that is not padding, some layers of an iteration at a time."""
        _, layers, ranks, tokens, _ = self.expert_ids.shape
        num_experts, some = self.metadata.num_experts, max(1, _CHECKED_TOKENS // max(1, ranks * tokens))
        for iteration, counts in enumerate(self.num_tokens):
            valid = np.arange(tokens)[None, :] < counts[:, None]
            where = f"trace of {self.metadata.model}: iteration {iteration}"
            for layer in range(0, layers, some):
                ids = self.expert_ids[iteration, layer : layer + some][:, valid]
                if ids.size and int(ids.max()) >= num_experts:
                    raise ValueError(f"{where} names expert {int(ids.max())}, num_experts is {num_experts}")
                if has_twice(ids).any():
                    raise ValueError(f"{where} has a token with an expert twice")

    def save(self, path: str | Path) -> None:
        """Write the trace as a zip of .npy files (``numpy.load`` reads it) and metadata.json with checksums."""
        arrays = {"expert_ids": self.expert_ids, "num_tokens": self.num_tokens}
        if self.weights is not None:
            arrays["weights"] = self.weights
        write_archive(Path(path), self.metadata.model_dump(), arrays)

    @classmethod
    def load(cls, path: str | Path) -> "RoutingTrace":
        """Read and check a trace.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, altered, of another format, larger than memory, or breaks a rule of the
                class.
        """
        stated, arrays = read_archive(Path(path))
        metadata = checked(stated, TraceMetadata, f"{path} has bad metadata")
        return cls(arrays["expert_ids"], arrays["num_tokens"], metadata, arrays.get("weights"))

    def reshard(self, num_ranks: int, tokens_per_rank: int) -> "RoutingTrace":
        """Regroup contiguous tokens: iteration after iteration, rank after rank, cut anew into G' ranks of T' tokens.

        Padding of ranks that are not full is left out. What is left over at the end, less than one iteration, is
        dropped. Each new iteration takes training step and loss of the first old iteration that it draws from.

        Raises:
            ValueError: the trace is too short.
        """
        layers, tokens, recorded = (self.expert_ids.shape[axis] for axis in (1, 3, 4))
        if (num_ranks, tokens_per_rank) == self.expert_ids.shape[2:4]:
            return self
        per_iteration = num_ranks * tokens_per_rank
        ends_I = self.num_tokens.sum(axis=1, dtype=np.int64).cumsum()
        count = int(ends_I[-1] // per_iteration)
        if count == 0:
            fitting = int(ends_I[-1]) // (2 * num_ranks)
            raise ValueError(
                f"trace of {self.metadata.model} has {ends_I[-1]} tokens, one iteration asks {per_iteration}: "
                f"{tokens_per_rank} on each of {num_ranks} ranks"
                + (f"; two iterations fit with tokens_per_rank={fitting}" if fitting else "")
            )
        filled_IGT = np.arange(tokens) < self.num_tokens[..., None]

        def regroup(array: np.ndarray) -> np.ndarray:
            flat = np.moveaxis(array, 1, 0)
            flat = flat.reshape(layers, -1, recorded) if filled_IGT.all() else flat[:, filled_IGT]
            flat = flat[:, : count * per_iteration]
            return np.moveaxis(flat.reshape(layers, count, num_ranks, tokens_per_rank, recorded), 0, 1)

        starts = np.arange(count, dtype=np.int64) * per_iteration
        first_old = np.searchsorted(ends_I, starts, side="right").tolist()
        kept = {name: [getattr(self.metadata, name)[i] for i in first_old] for name in ("training_step", "loss")}
        return RoutingTrace(
            expert_ids=regroup(self.expert_ids),
            num_tokens=np.full((count, num_ranks), tokens_per_rank, dtype=np.int32),
            metadata=self.metadata.model_copy(update=kept),
            weights=None if self.weights is None else regroup(self.weights),
        )

    def only(self, layer: int) -> "RoutingTrace":
        """One layer, by position.

        Raises:
            ValueError: there is no such layer.
        """
        self.check(layer, 1)
        here = slice(layer, layer + 1)
        return replace(
            self,
            expert_ids=self.expert_ids[:, here],
            metadata=self.metadata.model_copy(update={"layers": self.metadata.layers[here]}),
            weights=None if self.weights is None else self.weights[:, here],
        )

    @classmethod
    def joined(cls, traces: Sequence["RoutingTrace"]) -> "RoutingTrace":
        """Traces of one model and equal ranks, one after another; several have ids alone, without weights.

        Raises:
            ValueError: they differ in experts or layers.
        """
        first, *others = traces
        if not others:
            return first
        for other in others:
            first.check_alike(other)
        added = {name: [x for one in traces for x in getattr(one.metadata, name)] for name in ("training_step", "loss")}
        return cls(
            np.concatenate([one.expert_ids for one in traces]),
            np.concatenate([one.num_tokens for one in traces]),
            first.metadata.model_copy(update=added),
        )

    def check_alike(self, other: "RoutingTrace") -> None:
        """Refuse a trace of other experts or layers.

        Raises:
            ValueError: names what differs.
        """
        for name in ("num_experts", "topk", "num_recorded", "layers"):
            one, another = getattr(self.metadata, name), getattr(other.metadata, name)
            if one != another:
                raise ValueError(f"the traces do not go together: {name}={one} in one, {another} in another")

    def check(self, layer: int, topk: int) -> None:
        """Refuse what was not recorded.

        Raises:
            ValueError: there is no such layer (by position), or K exceeds what was recorded.
        """
        recorded, layers = self.metadata.num_recorded, self.expert_ids.shape[1]
        if topk > recorded:
            raise ValueError(f"topk={topk} exceeds the {recorded} experts per token that the trace recorded")
        if not 0 <= layer < layers:
            raise ValueError(f"layer={layer} is not among the trace's {layers} layers")


@dataclass(frozen=True)
class RecordedRouting:
    """One layer of a trace as a source of routing steps, the first ``topk`` choices of each token."""

    trace: RoutingTrace
    layer: int  # position in the trace
    topk: int

    def __post_init__(self) -> None:
        self.trace.check(self.layer, self.topk)

    @property
    def num_distinct(self) -> int:
        """Iterations of the trace."""
        return self.trace.expert_ids.shape[0]

    def step(self, iteration: int) -> RoutingStep:
        """Routing of one recorded iteration."""
        ids_GTK = torch.from_numpy(self.trace.expert_ids[iteration, self.layer, :, :, : self.topk].astype(np.int64))
        num_tokens_G = torch.from_numpy(self.trace.num_tokens[iteration].astype(np.int64))
        return make_step(ids_GTK, num_tokens_G, self.trace.metadata.num_experts)


def open_recorded(request: RoutingRequest, path: str, layer: int = 0, stage: str = "") -> RecordedRouting:
    """A recorded trace as a routing source, cut to the ranks and tokens of the run.

    Args:
        request: G, T, E and K of the run.
        path: the trace; in it ``{trace}`` is the model's trace name, ``{num_experts}`` E, and ``{stage}`` the stage.
        layer: position of the layer in the trace.
        stage: of the training that was recorded.

    Raises:
        NotApplicable: no such trace was recorded.
        ValueError: the trace is damaged, or its E or K do not fit.
    """
    trace = load_recorded(request, path, stage)
    return RecordedRouting(trace.reshard(request.num_ranks, request.tokens_per_rank), layer, request.topk)


def load_recorded(request: RoutingRequest, path: str, stage: str = "") -> RoutingTrace:
    """The trace of a request's model; see :func:`open_recorded`.

    Raises:
        NotApplicable: no such trace was recorded.
        ValueError: the trace is damaged, or its E does not fit.
    """
    file = recorded_path(path, request, stage)
    if not file.exists():
        meant = or_else(file.stem, sorted(path.stem for path in file.parent.glob("*.trace")))
        raise NotApplicable(
            f"no trace was recorded at {shown(file)} (results/traces/README.md: how to record one); {meant}"
        )
    trace = RoutingTrace.load(file)
    if trace.metadata.num_experts != request.num_experts:
        raise ValueError(
            f"{file} was recorded with num_experts={trace.metadata.num_experts}, the model has {request.num_experts}"
        )
    return trace


def trace_file(name: str) -> Path:
    """The file of a trace: one in results/traces/ or a fetched public one by its name, else any by its path.

    Raises:
        ValueError: there is neither.
    """
    for folder in (TRACES, PUBLIC):
        if (file := folder / f"{name}.trace").is_file():
            return file
    if not Path(name).is_file():
        known = sorted(path.stem for folder in (TRACES, PUBLIC) for path in folder.glob("*.trace"))
        raise unknown("trace", name, known, ", or name a file")
    return Path(name)


def recorded_path(path: str, request: RoutingRequest, stage: str = "") -> Path:
    """The file that a configured path stands for; see :func:`open_recorded`."""
    for name, value in (("trace", request.trace), ("num_experts", request.num_experts), ("stage", stage)):
        path = path.replace(f"{{{name}}}", str(value))
    return find_file(path)


def has_twice(expert_ids: np.ndarray) -> np.ndarray:
    """Which tokens name an expert twice: bool [...] of integer [..., K]."""
    ordered = np.sort(expert_ids, axis=-1)
    return (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)


def _smallest_dtype(num_experts: int, ids: np.ndarray) -> np.dtype:
    """Smallest unsigned integer for expert ids; values that would not survive the conversion are refused."""
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"expert_ids has dtype {ids.dtype}; the rule is an integer")
    dtype = np.min_scalar_type(num_experts - 1)
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) > np.iinfo(dtype).max):
        raise ValueError(f"expert_ids has values {int(ids.min())}..{int(ids.max())}, num_experts is {num_experts}")
    return dtype
