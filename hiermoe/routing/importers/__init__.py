"""Routing that others have recorded, as traces of this project: one file a format, and the list of them.

A file of a format says in the first line of its text what it reads, and has two functions. ``recognized`` looks at a
path and says in words what it is, or None where it is of another format. ``read`` takes a `Source` and gives a
`Recording`; it raises ValueError, one line with file and line or row, for what does not follow the format. What holds
for all formats (ranges, distinct experts, ranks) is checked and laid out in `recording`. A further format is one file
and one entry here.
"""

from hiermoe.routing.importers import esft_text, llama_csv, megatron_jsonl, parquet, routed_experts, sequences_npz

IMPORTERS = {
    "megatron": megatron_jsonl,
    "parquet": parquet,
    "npy": routed_experts,
    "npz": sequences_npz,
    "llama-csv": llama_csv,
    "esft": esft_text,
}

OF_SOME: dict[str, tuple[str, ...]] = {
    "pipeline": ("megatron",),
    "chunks": ("megatron",),
    "zeros": ("npy", "npz"),
    "first_layer": ("npy", "npz"),
}
"""Options that not every format has a use for: the formats that have."""
