"""Whether routing has collapsed: a few experts take nearly all choices, and the others might as well not be there.

What a dispatcher or a placement gains on such routing is no gain that a healthy router would see.
"""

import numpy as np

from hiermoe.routing.trace import RoutingTrace

NEARLY_ALL = 0.99  # of all choices
FEW = 0.25  # of all experts
CHOICES_PER_EXPERT = 4  # that are seen at least, or experts are missing by chance


def collapse(load_E: np.ndarray) -> str | None:
    """How routing has collapsed, as the end of a sentence; None where it has not, or too little of it is seen.

    Args:
        load_E: number of times that each expert was chosen.
    """
    total, experts = float(load_E.sum()), len(load_E)
    if total < CHOICES_PER_EXPERT * experts:
        return None
    taken = np.sort(load_E)[::-1].cumsum()
    busy = int(np.searchsorted(taken, NEARLY_ALL * total)) + 1
    if busy > FEW * experts:
        return None
    never = int((load_E == 0).sum())
    also = f", {never} are never chosen" if never else ""
    return f"{NEARLY_ALL:.0%} of all choices fall on {busy} of {experts} experts{also}"


def collapsed_layers(trace: RoutingTrace) -> list[str]:
    """A sentence on every layer whose routing has collapsed."""
    meta = trace.metadata
    load_LE = np.zeros((len(meta.layers), meta.num_experts), np.int64)
    for ids_LGTK, num_tokens_G in zip(trace.expert_ids[..., : meta.topk], trace.num_tokens, strict=True):
        filled_GT = np.arange(ids_LGTK.shape[2]) < num_tokens_G[:, None]
        for load_E, ids_GTK in zip(load_LE, ids_LGTK, strict=True):
            load_E += np.bincount(ids_GTK[filled_GT].ravel(), minlength=meta.num_experts)
    found = zip(meta.layers, map(collapse, load_LE), strict=True)
    return [f"Routing of layer {layer} has collapsed: {how}." for layer, how in found if how]
