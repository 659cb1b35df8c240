"""Times dispatch and combine of any Megatron dispatcher, forward and backward, and says what they sent."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from hiermoe.dispatch.interposer import Interposer, Transfer, busy_ms, synchronise
from hiermoe.dispatch.plan import DispatchPlan
from hiermoe.megatron.delegating import DelegatingDispatcher

_STOCK_STAGES = {"all_gather": "counts", "all_to_all": "1:world"}


@dataclass(frozen=True)
class Call:
    """One dispatch or combine of one layer, or its backward, on this rank.

    Attributes:
        layer: Megatron's layer number.
        phase: ``dispatch``, ``combine``, ``combine_backward`` or ``dispatch_backward``.
        total_ms: all of the call, local work included; without what a policy measured meanwhile.
        transfers: what was sent in it.
        plan: what it followed; None where the dispatcher has none (a stock class).
    """

    layer: int
    phase: str
    total_ms: float
    transfers: tuple[Transfer, ...]
    plan: DispatchPlan | None

    @property
    def wire_ms(self) -> float:
        """Time in collectives, those of counts and metadata included; what overlaps counts once."""
        return busy_ms(self.transfers)


class Meter:
    """Collects calls and transfers of all layers that it was attached to, while active.

    Example:
        >>> with Meter() as meter:
        ...     attach(model, "hd2", "a6000_4x8", meter=meter)
        ...     train_step()
        >>> sum(call.wire_ms for call in meter.drain())
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        align: Callable[[], Any] | None = None,
        repeatable: bool = False,
    ) -> None:
        """Prepare; nothing is measured before the context is entered.

        Args:
            clock: in seconds; ``time.thread_time`` leaves out what the process waits.
            align: called before the clock of every call starts. A barrier keeps out of a call what ranks did before it
                at different times; None where ranks should meet as they do.
            repeatable: transfers can be repeated, until calls are drained.
        """
        self._clock, self._align = clock, align
        self._interposer = Interposer(clock, repeatable)
        self._calls: list[Call] = []
        self._started: float | None = None
        self.active = False

    def __enter__(self) -> Self:
        self._interposer.__enter__()
        self.active = True
        return self

    def __exit__(self, *exception: object) -> None:
        self.active = False
        self._interposer.__exit__(*exception)

    def drain(self) -> list[Call]:
        """Hand over the finished calls since the last time, in order, and forget them."""
        calls, self._calls = self._calls, []
        return calls

    def start(self, phase: str, device: torch.device) -> None:
        """A call begins; what is sent from now on belongs to it."""
        self._interposer.drain()
        self._interposer.phase = phase
        synchronise(device)
        if self._align is not None:
            self._align()
        self._started = self._clock()

    @contextmanager
    def left_out(self, device: torch.device) -> Iterator[None]:
        """What happens inside is no part of the call that runs, if one does.

        Ranks meet after it if they meet before calls; else waiting for one that takes longer is a part of the call.
        """
        if self._started is None:
            yield
            return
        synchronise(device)
        left = self._clock()
        yield
        if self._align is not None:
            self._align()
        self._started += self._clock() - left

    def stop(self, layer: int, phase: str, plan: DispatchPlan | None, device: torch.device) -> None:
        """The call ends."""
        synchronise(device)
        if self._started is None or self._interposer.phase != phase:
            raise RuntimeError(f"{phase} of layer {layer} ends, but {self._interposer.phase or 'nothing'} had begun")
        total_ms = (self._clock() - self._started) * 1e3
        transfers = self._interposer.drain()
        if plan is None:  # a stock class does not name its stages
            transfers = [replace(t, stage=_STOCK_STAGES.get(t.operation, t.stage)) for t in transfers]
        self._calls.append(Call(layer, phase, total_ms, tuple(transfers), plan))
        self._interposer.phase, self._started = "", None


class MeteredDispatcher(DelegatingDispatcher):
    """Another dispatcher whose calls a `Meter` times.

    A forward call is timed from its first hook to its last. A backward call is timed between two marks in the autograd
    graph, at the inputs and at the outputs of the forward call.
    """

    def __init__(self, inner: Any, layer: int, meter: Meter) -> None:
        """Wrap ``inner``.

        Args:
            inner: what does the work.
            layer: Megatron's layer number.
            meter: where the times go.
        """
        super().__init__(inner)
        self._layer, self._meter = layer, meter
        self._plan_in_backward: DispatchPlan | None = None

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> Any:
        """As the inner one; dispatch begins."""
        tokens, probs = self._mark("dispatch_backward", False, tokens, probs)
        self._start("dispatch", tokens)
        return self.inner.dispatch_preprocess(tokens, routing_map, probs)

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> Any:
        """As the inner one; dispatch ends."""
        rows, tokens_per_expert, weights = self.inner.dispatch_postprocess(hidden_states, probs)
        self._stop("dispatch", rows)
        rows, weights = self._mark("dispatch_backward", True, rows, weights)
        return rows, tokens_per_expert, weights

    def combine_preprocess(self, hidden_states: Tensor) -> Any:
        """As the inner one; combine begins."""
        (hidden_states,) = self._mark("combine_backward", False, hidden_states)
        self._start("combine", hidden_states)
        return self.inner.combine_preprocess(hidden_states)

    def combine_postprocess(self, hidden_states: Tensor) -> Any:
        """As the inner one; combine ends."""
        output = self.inner.combine_postprocess(hidden_states)
        self._stop("combine", output)
        return self._mark("combine_backward", True, output)[0]

    def _start(self, phase: str, tensor: Tensor) -> None:
        if self._meter.active:
            self._meter.start(phase, tensor.device)

    def _stop(self, phase: str, tensor: Tensor) -> None:
        if self._meter.active:
            self._meter.stop(self._layer, phase, getattr(self.inner, "plan", None), tensor.device)

    def _mark(self, phase: str, begins: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        """In backward, when the gradients of all these tensors are there, the phase begins or ends."""
        plan = getattr(self.inner, "plan", None) if begins else None

        def notify(device: torch.device) -> None:
            if not self._meter.active:
                return
            if begins:
                self._meter.start(phase, device)
                self._plan_in_backward = plan
            else:
                self._meter.stop(self._layer, phase, self._plan_in_backward, device)

        return _Mark.apply(notify, *tensors)  # type: ignore[return-value]


class _Mark(torch.autograd.Function):
    """The identity; tells when backward passes it."""

    @staticmethod
    def forward(ctx: Any, notify: Callable[[torch.device], None], *tensors: Tensor) -> Any:
        ctx.notify = notify
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.notify(gradients[0].device)
        return None, *gradients
