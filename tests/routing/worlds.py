"""Small traces and requests for the tests of routing."""

from typing import Any

import numpy as np

from hiermoe.routing.step import RoutingRequest
from hiermoe.routing.trace import RoutingTrace, TraceMetadata


def a_request(**changes: Any) -> RoutingRequest:
    """The paper's base case with fewer tokens."""
    sizes: dict[str, Any] = {"num_experts": 128, "topk": 8, "num_ranks": 32, "tokens_per_rank": 64}
    return RoutingRequest(trace="any", **(sizes | changes))


def some_metadata(iterations: int = 3, layers: int = 2, **changes: Any) -> TraceMetadata:
    """Metadata of 16 experts, the best 4 stored."""
    values: dict[str, Any] = {
        "model": "small",
        "num_experts": 16,
        "topk": 2,
        "num_recorded": 4,
        "router": "softmax",
        "corpus": "none",
        "vocabulary": 64,
        "seed": 0,
        "training_step": [10 * i for i in range(iterations)],
        "loss": [4.0 - i for i in range(iterations)],
        "layers": list(range(layers)),
        "how_made": "tests",
        "versions": {"torch": "any"},
    }
    return TraceMetadata(**(values | changes))


def a_trace(
    shape: tuple[int, int, int, int] = (3, 2, 2, 5), num_tokens: list[list[int]] | None = None, **changes: Any
) -> RoutingTrace:
    """A random trace of [iteration, layer, rank, T], full unless ``num_tokens`` says otherwise."""
    metadata = some_metadata(shape[0], shape[1], **changes)
    ids = np.argsort(np.random.default_rng(0).random((*shape, metadata.num_experts)))[..., : metadata.num_recorded]
    counts = np.full((shape[0], shape[2]), shape[3]) if num_tokens is None else np.array(num_tokens)
    return RoutingTrace(ids, counts.astype(np.int32), metadata)
