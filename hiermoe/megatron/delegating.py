"""Dispatchers that wrap another one; and the control that reorders sums."""

from typing import Any

from torch import Tensor


class DelegatingDispatcher:
    """Passes everything on to another dispatcher of Megatron's kind, which stays usable on its own."""

    def __init__(self, inner: Any) -> None:
        """Wrap ``inner``."""
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not yet set, e.g. while being unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)


class ReorderedTokenDispatcher(DelegatingDispatcher):
    """Another dispatcher that gets every rank's tokens in reverse: a control that only changes the order of sums."""

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> Any:
        """Reverse, then as the inner one."""
        self._shape = tokens.shape
        reversed_tokens = tokens.reshape(-1, 1, tokens.shape[-1]).flip(0)
        return self.inner.dispatch_preprocess(reversed_tokens, routing_map.flip(0), probs.flip(0))

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """As the inner one, then reverse."""
        return self.inner.combine_postprocess(hidden_states).flip(0).reshape(self._shape)
