"""Routing that others have recorded, as traces of this project: one file a format, and the list of them.

A file of a format says in the first line of its text what it reads, and has two functions. ``recognized`` looks at a
path and says in words what it is, or None where it is of another format. ``read`` takes a `Source` and gives a
`Recording`; it raises ValueError, one line with file and line or row, for what does not follow the format. What holds
for all formats (ranges, distinct experts, ranks) is checked and laid out in `recording`. A further format is one file
and one entry here.
"""

from hiermoe.routing.importers import (
    esft_text,
    http_responses,
    llama_csv,
    megatron_jsonl,
    parquet,
    replay_lists,
    request_json,
    rollout_samples,
    routed_experts,
    router_logits,
    sequences_npz,
    sglang_recorder,
    tensorrt_llm,
)

IMPORTERS = {
    "megatron": megatron_jsonl,
    "parquet": parquet,
    "npy": routed_experts,
    "npz": sequences_npz,
    "llama-csv": llama_csv,
    "esft": esft_text,
    "sglang": sglang_recorder,
    "responses": http_responses,
    "rollouts": rollout_samples,
    "replay": replay_lists,
    "logits": router_logits,
    "requests": request_json,
    "tensorrt-llm": tensorrt_llm,
}

_BY_PLACE = ("npy", "npz", "responses", "rollouts", "replay", "logits")
OF_SOME: dict[str, tuple[str, ...]] = {
    "pipeline": ("megatron",),
    "chunks": ("megatron",),
    "zeros": ("npy", "npz", "responses", "rollouts"),
    "first_layer": _BY_PLACE,
}
"""Options that not every format has a use for: the formats that have."""
