"""Counts and times everything that ranks send, by standing between torch.distributed and its process groups.

All functions of ``torch.distributed`` end in a method of ``ProcessGroup``, whoever calls them and whatever reference to
them a caller kept. These methods are replaced while an `Interposer` is active, so the suite's own exchange and
Megatron's classes are counted by the same code.
"""

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor

Kind = Literal["payload", "metadata"]


@dataclass(frozen=True)
class Transfer:
    """One collective or one point-to-point message, as this rank saw it.

    Attributes:
        operation: ``all_to_all``, ``all_gather``, ``all_reduce``, ``send``, ``receive`` or another method's name.
        members: global ranks of the group, in group order.
        kind: ``payload``: rows of hidden states or their gradients, known by being floating and two-dimensional.
            ``metadata``: everything else (counts, expert numbers, routing weights and their gradients).
        sent_bytes: to every member, own share included; of an operation without a certain receiver, the same to all.
        received_bytes: from every member, own share included.
        started_s: when it was called, by the interposer's clock.
        ended_s: when the result was there: of an asynchronous AlltoAll when waiting for it ended, of another
            asynchronous call when it returned.
        phase: what was going on, as named by the caller (``dispatch``, ``combine_backward``); empty for nothing.
        stage: which stage of a scheme this was (``1:inter1``); empty for none.
        repeat: sends the same again, over what it received; None where the `Interposer` does not keep it.
    """

    operation: str
    members: tuple[int, ...]
    kind: Kind
    sent_bytes: tuple[int, ...]
    received_bytes: tuple[int, ...]
    started_s: float
    ended_s: float
    phase: str
    stage: str
    repeat: Callable[[], None] | None = field(default=None, compare=False, repr=False)

    @property
    def wire_ms(self) -> float:
        """From the call until the result is there."""
        return (self.ended_s - self.started_s) * 1e3


def busy_ms(transfers: Iterable[Transfer]) -> float:
    """Time in which at least one of them was on its way."""
    total_s, until_s = 0.0, -math.inf
    for one in sorted(transfers, key=lambda one: one.started_s):
        total_s += max(0.0, one.ended_s - max(one.started_s, until_s))
        until_s = max(until_s, one.ended_s)
    return total_s * 1e3


# What a method of ProcessGroup is called in the versions of torch that this project supports, and how to read its call.
_ALL_TO_ALL = ("all_to_all_single", "alltoall_base")
_ALL_GATHER = ("all_gather_single", "_allgather_base")
_OTHERS = {
    "allgather": "all_gather",
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "gather": "gather",
    "scatter": "scatter",
}


class Interposer:
    """Records every transfer of this process while it is active.

    Example:
        >>> with Interposer() as interposer:
        ...     dist.all_reduce(x)
        >>> interposer.drain()[0].operation
        'all_reduce'

    On CUDA every recorded call is followed by a synchronisation, so that its time is its own.

    Attributes:
        active: the one that is recording.
        phase: name for transfers from now on.
        stage: likewise; set by `staged`.
    """

    active: ClassVar["Interposer | None"] = None

    def __init__(self, clock: Callable[[], float] = time.perf_counter, repeatable: bool = False) -> None:
        """Prepare; nothing is replaced before the context is entered.

        Args:
            clock: in seconds; ``time.thread_time`` leaves out what the process waits.
            repeatable: keep what it takes to repeat a transfer, its tensors among it, until it is drained.
        """
        self._repeatable = repeatable
        self._clock = clock
        self.phase = ""
        self.stage = ""
        self._transfers: list[Transfer] = []
        self._originals: dict[str, Any] = {}

    def __enter__(self) -> Self:
        if Interposer.active is not None:
            raise RuntimeError("an Interposer is active already: transfers would be counted twice")
        group = dist.ProcessGroup
        readers: dict[str, Callable[..., Any]] = {
            **dict.fromkeys(_ALL_TO_ALL, _read_all_to_all),
            **dict.fromkeys(_ALL_GATHER, _read_all_gather),
            **{name: _reader_of(label) for name, label in _OTHERS.items()},
            "send": _message_reader("send"),
            "recv": _message_reader("receive"),
        }
        present = {name: reader for name, reader in readers.items() if hasattr(group, name)}
        if not (set(_ALL_TO_ALL) & set(present) and set(_ALL_GATHER) & set(present)):
            raise RuntimeError(f"torch {torch.__version__} names the methods of ProcessGroup in a way not known here")
        for name, reader in present.items():
            # What the class holds, and not what getattr() makes of it: that would no longer bind its group.
            self._originals[name] = inspect.getattr_static(group, name)
            setattr(group, name, self._recording(getattr(group, name), reader))
        Interposer.active = self
        return self

    def __exit__(self, *_exception: object) -> None:
        for name, original in self._originals.items():
            setattr(dist.ProcessGroup, name, original)
        self._originals = {}
        Interposer.active = None

    def drain(self) -> list[Transfer]:
        """Hand over what was recorded since the last call, in order, and forget it."""
        drained, self._transfers = self._transfers, []
        return drained

    def _recording(self, original: Callable[..., Any], read: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            operation, tensor, sent, received = read(group, *args, **kwargs)
            asynchronous = operation in ("send", "receive") or any(getattr(x, "asyncOp", False) for x in args)
            if not asynchronous:  # which goes on beside what is under way
                synchronise(tensor.device)
            started = self._clock()
            work = original(group, *args, **kwargs)
            if work is not None and not asynchronous:
                work.wait()
                synchronise(tensor.device)
            ended = self._clock()
            kind: Kind = "payload" if tensor.is_floating_point() and tensor.dim() == 2 else "metadata"
            members = tuple(dist.get_process_group_ranks(group))

            def repeat() -> None:
                again = original(group, *args, **kwargs)
                if again is not None:
                    again.wait()
                synchronise(tensor.device)

            kept = repeat if self._repeatable else None
            position = len(self._transfers)
            transfer = Transfer(operation, members, kind, sent, received, started, ended, self.phase, self.stage, kept)
            self._transfers.append(transfer)
            if not asynchronous or operation != "all_to_all":
                return work

            def waited() -> None:
                synchronise(tensor.device)
                if position < len(self._transfers) and self._transfers[position] is transfer:  # not drained before
                    self._transfers[position] = replace(transfer, ended_s=self._clock())

            return _Awaited(work, waited)

        return recorded


class _Awaited:
    """Work of an asynchronous call that tells when it has been waited for."""

    def __init__(self, work: Any, waited: Callable[[], None]) -> None:
        self._work, self._waited = work, waited

    def wait(self, *args: Any) -> bool:
        """As torch's."""
        done = self._work.wait(*args)
        self._waited()
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextmanager
def staged(stage: str) -> Iterator[None]:
    """Names the stage of the transfers inside; does nothing while no `Interposer` is active."""
    interposer = Interposer.active
    if interposer is None:
        yield
        return
    previous, interposer.stage = interposer.stage, stage
    try:
        yield
    finally:
        interposer.stage = previous


def synchronise(device: torch.device) -> None:
    """Wait until a GPU is through."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _split_bytes(tensor: Tensor, splits: Sequence[int], size: int) -> tuple[int, ...]:
    if len(splits) == 0:
        return (_num_bytes(tensor) // size,) * size
    per_row = _num_bytes(tensor) // len(tensor) if len(tensor) else 0
    return tuple(int(rows) * per_row for rows in splits)


def _read_all_to_all(
    group: dist.ProcessGroup, output: Tensor, source: Tensor, output_splits: Any, input_splits: Any, *_rest: Any
) -> Any:
    sent, received = _split_bytes(source, input_splits, group.size()), _split_bytes(output, output_splits, group.size())
    return "all_to_all", source, sent, received


def _read_all_gather(group: dist.ProcessGroup, output: Tensor, source: Tensor, *_rest: Any) -> Any:
    size = group.size()
    return "all_gather", source, (_num_bytes(source),) * size, (_num_bytes(output) // size,) * size


def _reader_of(operation: str) -> Callable[..., Any]:
    def read(group: dist.ProcessGroup, first: Any, *_rest: Any, **_kwargs: Any) -> Any:
        tensors = list(_tensors(first))
        tensor = tensors[0] if tensors else torch.empty(0)
        each = (sum(_num_bytes(x) for x in tensors),) * group.size()
        return operation, tensor, each, each

    return read


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from _tensors(item)


def _message_reader(operation: str) -> Callable[..., Any]:
    def read(group: dist.ProcessGroup, tensors: list[Tensor], peer: int, *_rest: Any) -> Any:
        moved = tuple(_num_bytes(tensors[0]) if member == peer else 0 for member in range(group.size()))
        nothing = (0,) * group.size()
        return operation, tensors[0], *((moved, nothing) if operation == "send" else (nothing, moved))

    return read
