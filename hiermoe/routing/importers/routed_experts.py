"""vLLM's routed_experts: a NumPy array [tokens, layers, K] of expert ids, saved by ``numpy.save``.

vLLM returns ``prompt_routed_experts`` [prompt tokens, MoE layers, K] and ``routed_experts`` [generated tokens, MoE
layers, K], int16 (uint8 in some versions), for every request; concatenate those of all requests along the first axis
before saving. Layers are numbered by their place in the array, from 0: the array counts MoE layers and names none.

Tokens of which vLLM knows no routing are -1 throughout; older versions count all layers and have zeros in those without
experts. Both are left out, and the import says how many. At K = 1 zeros of some tokens may be expert 0: it asks.
"""

import numpy as np

from hiermoe.routing.importers.recording import CHUNK_TOKENS, Recording, Source, narrowed


def read(source: Source) -> Recording:
    """Read the array, a part at a time.

    Raises:
        ValueError: not such an array, truncated, or K is another one than was asked for.
    """
    path = source.path
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: it is truncated or no .npy file: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 3:
        found = f"shape {array.shape}" if isinstance(array, np.ndarray) else "an archive of arrays"
        raise ValueError(f"{path}: {found}; the rule is one array [tokens, layers, K]")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{path}: dtype {array.dtype}; the rule is an integer")
    tokens, layers, topk = array.shape
    if source.topk not in (None, topk):
        raise ValueError(f"{path}: K={topk} experts a token, topk={source.topk} was asked for")
    if topk == 0:
        raise ValueError(f"{path}: K=0 experts a token")
    count = min(tokens, source.max_tokens or tokens)

    def where(layer: int, row: int) -> str:
        return f"{path}: token {row}, layer {layer}"

    kept = source.kept(range(layers))
    ids = {layer: np.empty((count, topk), np.uint16) for layer in kept}
    for start in range(0, count, CHUNK_TOKENS):
        part = np.asarray(array[start : min(start + CHUNK_TOKENS, count)])
        for layer in kept:
            chunk = narrowed(part[:, layer], lambda row, at=start, of=layer: where(of, at + row))
            ids[layer][start : start + len(chunk)] = chunk
    notes = "Layers are numbered from 0 among the array's MoE layers. The order of a token's experts is the array's."
    return Recording(ids, (path,), where, notes, filled_with_zeros=True)
