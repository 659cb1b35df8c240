"""SGLang's recorder without single tokens: mode stat (``logical_count``), and per_pass (``global_physical_count``).

stat is int32 [steps, layers, E], per_pass [layers, P] a record, whose physical places go through
``last_physical_to_logical_map``. Counts of all steps are added. Layers are the model's, counted from 1; dense ones have
no counts. Give rank 0's file: counts are of all ranks together.
"""

from pathlib import Path

import numpy as np

from hiermoe.routing.importers.sglang_recorder import MAP, map_of
from hiermoe.routing.importers.torch_file import content_of, opened
from hiermoe.routing.load_forms.layer_loads import LayerLoads, checked_loads
from hiermoe.routing.trace import MOST_EXPERTS

_STAT, _PASS = "logical_count", "global_physical_count"
_NOTES = "Counts of all steps were added. Layers are SGLang's plus 1."


def recognized(path: Path) -> str | None:
    """What the file is, in words; None where it is of another form."""
    content = content_of(path)
    if not isinstance(content, dict):
        return None
    if _STAT in content:
        return "counts of SGLang's recorder, mode stat"
    records = content.get("records")
    first = records[0] if isinstance(records, list) and records else None
    passes = MAP in content and isinstance(first, dict) and _PASS in first and "topk_ids_of_layer" not in first
    return "counts of SGLang's recorder, mode per_pass" if passes else None


def read(path: Path) -> LayerLoads:
    """Add the counts of all steps.

    Raises:
        ValueError: not such a file, or counts that do not fit its map.
    """
    file = opened(path)
    content = file.content
    if isinstance(content, dict) and _STAT in content:
        count_SLE = file.array(content[_STAT], f"{path}: {_STAT}", "integer", 3)
        if count_SLE.size and count_SLE.min() < 0:
            raise ValueError(f"{path}: {_STAT} has a count below 0")
        return _added(path, count_SLE.sum(axis=0, dtype=np.float64))
    if not isinstance(content, dict) or not isinstance(content.get("records"), list) or not content["records"]:
        raise ValueError(f"{path}: it has neither {_STAT} nor records of {_PASS}")
    map_LP = map_of(content, file, path)
    if map_LP.max() >= MOST_EXPERTS:
        raise ValueError(f"{path}: {MAP} names expert {int(map_LP.max())}")
    total_LP = np.zeros(map_LP.shape)
    for at, record in enumerate(content["records"]):
        found = record.get(_PASS) if isinstance(record, dict) else None
        count_LP = file.array(found, f"{path}: record {at}", "integer", 2)
        if count_LP.shape != map_LP.shape or count_LP.min() < 0:
            raise ValueError(
                f"{path}: record {at}: counts {list(count_LP.shape)} below 0, or not of {list(map_LP.shape)}"
            )
        total_LP += count_LP
    experts = int(map_LP.max()) + 1
    rows = [np.bincount(places, counts, experts) for places, counts in zip(map_LP, total_LP, strict=True)]
    return _added(path, np.stack(rows))


def _added(path: Path, count_LE: np.ndarray) -> LayerLoads:
    return checked_loads(path, count_LE, list(range(1, len(count_LE) + 1)), _NOTES)
