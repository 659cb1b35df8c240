"""Loads of experts that others have counted, layer by layer: one file a form, and the list of them.

A file of a form has two functions. ``recognized`` looks at a path and says in words what it is, or None where it is of
another form. ``read`` gives `LayerLoads`, and raises ValueError, one line with the file, for what does not follow it.
"""

from hiermoe.routing.load_forms import (
    eplb_weights,
    imatrix_gguf,
    sglang_counts,
    tensorrt_llm_counts,
    tokens_per_expert,
)

LOAD_FORMS = {
    "eplb": eplb_weights,
    "sglang-counts": sglang_counts,
    "tokens-per-expert": tokens_per_expert,
    "tensorrt-llm-counts": tensorrt_llm_counts,
    "imatrix": imatrix_gguf,
}
