"""Routing that others have recorded, as traces of this project: one file a format, and the list of them.

A reader takes a `Source` and gives a `Recording`; what holds for all formats (ranges, distinct experts, ranks) is
checked and laid out in `recording`. A further format is one file and one line here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hiermoe.routing.importers import llama_csv, megatron_jsonl, parquet, routed_experts
from hiermoe.routing.importers.recording import Recording, Source


@dataclass(frozen=True)
class Importer:
    """A format.

    Attributes:
        read: the reader. It raises ValueError, one line with file and line or row, for what does not follow the format.
        reads: what it reads, in a line.
    """

    read: Callable[[Source], Recording]
    reads: str


IMPORTERS = {
    "megatron": Importer(megatron_jsonl.read, "Megatron-LM's router trace, .jsonl: {step, layer, rank, top_indices}"),
    "parquet": Importer(parquet.read, "Parquet with a list column `indices`, a row a token (FLAME-MoE)"),
    "npy": Importer(routed_experts.read, "NumPy array [tokens, layers, K] of expert ids (vLLM's routed_experts)"),
    "llama-csv": Importer(llama_csv.read, "CSV of `layer,expert`, K rows a token (llama.cpp's moe-trace)"),
}
