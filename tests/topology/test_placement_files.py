"""Placements as files: what SGLang and TensorRT-LLM read, and what comes back."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from hiermoe.topology.placement import Placement
from hiermoe.topology.placement_files import read_placements, write_placements

MOVED = Placement(torch.tensor([2, 0, 3, 1]))
HOME = Placement.identity(4)


def test_both_files_have_a_row_of_experts_by_slot_for_every_moe_layer(tmp_path: Path) -> None:
    sglang, tensorrt = write_placements(tmp_path / "new", {2: MOVED, 3: HOME})
    in_order = [0, 1, 2, 3]
    assert json.loads(sglang.read_text()) == {"physical_to_logical_map": [in_order, [2, 0, 3, 1], in_order]}
    assert yaml.safe_load(tensorrt.read_text()) == {
        "num_slots": 4,
        "initial_global_assignments": {1: [2, 0, 3, 1], 2: in_order},
        "layer_updates_per_iter": 0,
    }


def test_layers_behind_the_last_moe_layer_have_rows_too(tmp_path: Path) -> None:
    sglang, _ = write_placements(tmp_path, {1: MOVED}, num_layers=3)
    assert len(json.loads(sglang.read_text())["physical_to_logical_map"]) == 3


def test_what_was_written_is_read(tmp_path: Path) -> None:
    sglang, _ = write_placements(tmp_path, {2: MOVED})
    read = read_placements(sglang, 4)
    assert read.keys() == {1, 2}
    assert read[1].is_identity and read[2].key == MOVED.key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "is not"),
        ("[[0, 1]]", "is not"),
        ('{"physical_to_logical_map": 3}', "is not"),
        ('{"physical_to_logical_map": [[0, 1, 2, 2]]}', "row 0 does not name each of 4 experts once"),
        ('{"physical_to_logical_map": [[0, 1, 2, 3], [0, 1, 2]]}', "row 1 does not name each of 4 experts once"),
    ],
)
def test_another_form_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_placements(tmp_path / "a.json", 4)


def test_placements_that_no_model_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the rule is 1\.\.2"):
        write_placements(tmp_path, {3: MOVED}, num_layers=2)
    with pytest.raises(ValueError, match=r"\[4, 6\] slots"):
        write_placements(tmp_path, {1: MOVED, 2: Placement.identity(6)})
    with pytest.raises(ValueError, match="slots"):
        write_placements(tmp_path, {})
