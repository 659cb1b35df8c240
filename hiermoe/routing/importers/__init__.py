"""Routing that others have recorded, as traces of this project: one file a format, and the list of them.

A file of a format has a function ``read``, which takes a `Source` and gives a `Recording`, and says in the first line
of its text what it reads. What holds for all formats (ranges, distinct experts, ranks) is checked and laid out in
`recording`. ``read`` raises ValueError, one line with file and line or row, for what does not follow the format.
A further format is one file and one entry here.
"""

from hiermoe.routing.importers import llama_csv, megatron_jsonl, parquet, routed_experts

IMPORTERS = {"megatron": megatron_jsonl, "parquet": parquet, "npy": routed_experts, "llama-csv": llama_csv}
