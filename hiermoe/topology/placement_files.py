"""Placements of a model's layers as files that serving frameworks read, and the way back.

``placement.json`` is what SGLang's ``--init-expert-location`` takes: a row of experts by slot for every layer, layers
counted from 0, those without experts in order. ``placement.yaml`` is what TensorRT-LLM's expert load balancer takes:
the same rows by layer. `attach` reads the former.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from hiermoe.records.whole_file import write_all_whole
from hiermoe.topology.placement import Placement

SGLANG, TENSORRT = "placement.json", "placement.yaml"
_MAP = "physical_to_logical_map"


def write_placements(folder: Path, placements: Mapping[int, Placement], num_layers: int | None = None) -> list[Path]:
    """Write the placements of a model's MoE layers.

    Args:
        folder: made where it is not there.
        placements: by layer number, counted from 1, all with equally many slots.
        num_layers: of the model, MoE or not; None for as many as the last of them.

    Returns:
        The files.

    Raises:
        ValueError: no layer, a layer number that the model does not have, or another number of slots.
    """
    slots = {placement.num_slots for placement in placements.values()}
    last = num_layers or max(placements, default=0)
    if len(slots) != 1:
        raise ValueError(f"placements have {sorted(slots)} slots; the rule is one number for all layers")
    if not all(1 <= number <= last for number in placements):
        raise ValueError(f"placements of layers {sorted(placements)}: the rule is 1..{last}")
    (num_slots,) = slots
    num_experts = next(iter(placements.values())).num_experts
    in_order = [slot % num_experts for slot in range(num_slots)]
    rows = {number - 1: placement.expert_at_S.tolist() for number, placement in sorted(placements.items())}
    every = [rows.get(layer, in_order) for layer in range(last)]
    json_text = f'{{"{_MAP}": [\n' + ",\n".join(json.dumps(row) for row in every) + "\n]}\n"
    settings = {"num_slots": num_slots, "initial_global_assignments": rows, "layer_updates_per_iter": 0}
    yaml_text = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=120)
    write_all_whole(folder, {SGLANG: json_text.encode(), TENSORRT: yaml_text.encode()})
    return [folder / SGLANG, folder / TENSORRT]


def read_placements(path: Path, num_experts: int) -> dict[int, Placement]:
    """The placements of a file in SGLang's form, one slot for each expert.

    Args:
        path: of the file.
        num_experts: E of the model.

    Returns:
        By layer number, counted from 1; layers without experts too, with whatever the file has for them.

    Raises:
        OSError: there is no such file.
        ValueError: it has another form, or a row is no permutation of 0..E-1.
    """
    try:
        rows: Any = json.loads(path.read_text(encoding="utf-8"))[_MAP]
        found = [[int(expert) for expert in row] for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} is not {{"{_MAP}": [[...], ...]}}, a row of experts by slot for every layer'
        ) from error
    for layer, row in enumerate(found):
        if sorted(row) != list(range(num_experts)):
            raise ValueError(f"{path}: row {layer} does not name each of {num_experts} experts once")
    return {layer + 1: Placement(torch.tensor(row)) for layer, row in enumerate(found)}
