"""Files of torch.save: nothing is executed, no memory is taken for what they do not hold, ids go through maps."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Command
from tests.routing.importers.files import some_ids
from tests.routing.importers.hostile import check_refused
from tests.routing.importers.others import dense_first, recorder, saved, write_logits
from tests.routing.importers.test_round_trips import flat, imported

IDS = some_ids(layers=2, tokens=6)


def changed_record(**changes: Any) -> dict[str, Any]:
    """What SGLang saves, its first pass changed."""
    content: dict[str, Any] = recorder(IDS, 16)
    content["records"][0] |= changes
    return content


def changed_map(map_LP: Any) -> dict[str, Any]:
    return {**recorder(IDS, 16), "last_physical_to_logical_map": map_LP}


class Runs:
    """What would run where a pickle is trusted."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def samples(*arrays: Any) -> dict[str, Any]:
    return {"samples": [{"rollout_routed_experts": array} for array in arrays]}


HUGE = torch.zeros(1, dtype=torch.int32).expand(2**41, 2, 3)
LOGITS = torch.rand(6, 16)
TWICE = torch.tensor([3, 3, 4, -1, -1, -1, -1, -1], dtype=torch.int32).repeat(3, 2, 1)
TLK = dense_first(IDS)


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        ("sglang", [1], "it has no records of SGLang's recorder"),
        ("sglang", changed_map(None), "its physical ids stand for no experts"),
        ("sglang", changed_map(torch.full((3, 32), -1)), "is empty or names experts outside"),
        ("sglang", changed_map(torch.zeros(2, 32, dtype=torch.int64)), "3 layers, last_physical_to_logical_map has 2"),
        ("sglang", changed_record(topk_ids_of_layer=torch.full((3, 2, 8), 32)), "physical ids outside -1..31"),
        ("sglang", changed_record(topk_ids_of_layer=torch.full((3, 2, 8), -2)), "physical ids outside -1..31"),
        ("sglang", changed_record(topk_ids_of_layer=torch.zeros(3, 2, 8)), "dtype float32; the rule is integers"),
        ("sglang", changed_record(topk_ids_of_layer=TWICE), "a token has an expert twice"),
        ("sglang", changed_record(topk_ids_of_layer=HUGE), "the file has not as many numbers as it refers to"),
        ("sglang", changed_record(topk_ids_of_layer=[1]), "list; the rule is a tensor or array of integers"),
        (
            "sglang",
            {"records": [{}], "last_physical_to_logical_map": torch.zeros(1, 1).long()},
            "record in mode per_tok",
        ),
        ("rollouts", samples(HUGE), "the file has not as many numbers as it refers to"),
        ("rollouts", samples(TLK, TLK[:, :2]), "sample 1: 2 layers and K=3"),
        ("rollouts", samples(TLK - 5), "sample 0: token 0, layer 1: expert ids"),
        ("rollouts", samples(TLK + 10 * (TLK > 0)), "is outside 0..15"),
        ("rollouts", samples(TLK.astype(float)), "dtype float64; the rule is integers"),
        ("rollouts", samples(np.array([[[None]]])), "it is not read: it holds more than numbers"),
        ("rollouts", samples(), "no sample of it has rollout_routed_experts"),
        ("rollouts", samples(*[TLK] * 3000), "the file has not as many numbers as it refers to"),
        ("replay", {"a": 1}, "dict; the rule is a list of expert ids [T, K], one a layer"),
        ("replay", [HUGE[:, 0]], "the file has not as many numbers as it refers to"),
        ("replay", [torch.tensor([[1, 2]]), torch.tensor([[1, 2], [3, 4]])], "layer 1 is [2, 2], layer 0 is [1, 2]"),
        ("replay", [torch.tensor([[1, 70000]])], "token 0, layer 0: expert ids [1, 70000]"),
        ("replay", [torch.tensor([[1, 1]])], "token 0, layer 0: a token has an expert twice"),
        ("replay", [LOGITS], "dtype float32; the rule is integers"),
        ("replay", [None], "it has no tokens"),
        (
            "logits --topk 3",
            (LOGITS, LOGITS.masked_fill(LOGITS.eq(LOGITS[4, 2]), torch.nan)),
            "token 4, layer 1: a logit",
        ),
        ("logits --topk 3", (LOGITS, LOGITS[:, :8]), "layer 1 has shape [6, 8], another [6, 16]"),
        ("logits --topk 17", (LOGITS,), "16 logits a token; the rule is topk=17 to"),
        ("logits --topk 3", (LOGITS.int(),), "dtype int32; the rule is floats"),
        ("logits --topk 3", (torch.zeros(1).expand(2**42, 16),), "the file has not as many numbers as it refers to"),
        ("logits", (LOGITS,), "give --topk K"),
        ("replay", [Runs()], "it holds more than numbers, texts, lists and dicts (Unsupported"),
        ("sglang", {"records": [Runs()]}, "it holds more than numbers, texts, lists and dicts (Unsupported"),
    ],
)
def test_bad_content(
    form: str, content: object, message: str, hiermoe: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(hiermoe, form, saved(tmp_path / "a.pt", content), message, "--num-experts", "16")
    assert not Path("executed").exists()


def packed_again(path: Path) -> Path:
    """The same members, packed: what a bomb needs."""
    with zipfile.ZipFile(path) as archive:
        members = {info: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, content in members.items():
            archive.writestr(info.filename, content)
    return path


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-200])
    return path


def text(path: Path) -> Path:
    path.write_text("no file of torch")
    return path


@pytest.mark.parametrize(("harm", "message"), [
    (packed_again, "its members are packed or overlap, which torch.save never does"),
    (cut, "it is truncated or no file of torch.save"),
    (text, "it is truncated or no file of torch.save"),
])  # fmt: skip
@pytest.mark.parametrize("form", ["sglang", "rollouts", "replay", "logits"])
def test_bad_file(form: str, harm: Callable[[Path], Path], message: str, hiermoe: Command, tmp_path: Path) -> None:
    path = harm(saved(tmp_path / "a.pt", [torch.zeros(2000, 3)]))
    check_refused(hiermoe, form, path, message, "--num-experts", "16", "--topk", "3")


def test_passes_of_several_ranks_follow_each_other(tmp_path: Path) -> None:
    other = some_ids(layers=2, tokens=6, seed=1)
    for rank, ids in enumerate((IDS, other)):
        saved(tmp_path / f"expert_distribution_recorder_17.0_{rank}.pt", recorder(ids, 16))
    pairs = list(zip(np.array_split(IDS, 3, 1), np.array_split(other, 3, 1), strict=True))
    expected = np.concatenate([each for pair in pairs for each in pair], axis=1)
    trace = imported("sglang", tmp_path, None)
    np.testing.assert_array_equal(flat(trace), expected)
    assert trace.metadata.left_out == ("layers 1, which have no routing (all -1 or 0)",)


def test_ranks_with_the_same_tokens_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        saved(tmp_path / f"expert_distribution_recorder_17.0_{rank}.pt", recorder(IDS, 16))
    with pytest.raises(ValueError, match="it has the tokens of another rank"):
        imported("sglang", tmp_path, None)


def test_holes_of_rollouts_are_no_expert(tmp_path: Path) -> None:
    for fill in (0, -1):
        holed = TLK.copy()
        holed[2] = fill
        trace = imported("rollouts", saved(tmp_path / "a.pt", samples(torch.from_numpy(holed), TLK)))
        np.testing.assert_array_equal(flat(trace), np.concatenate([np.delete(IDS, 2, 1), IDS], axis=1))
        assert trace.metadata.layers == [2, 3]
        assert any("1 of 12 tokens, which have no routing" in each for each in trace.metadata.left_out)


def test_an_array_alone_is_rollouts_and_a_layer_may_be_given(tmp_path: Path) -> None:
    trace = imported("rollouts", saved(tmp_path / "a.pt", torch.from_numpy(TLK[:, 1:])), first_layer=5)
    np.testing.assert_array_equal(flat(trace), IDS)
    assert trace.metadata.layers == [5, 6]


def test_logits_say_what_they_cannot(tmp_path: Path) -> None:
    notes = imported("logits", write_logits(tmp_path / "a.pt", IDS, 16), None, topk=3).metadata.notes
    assert "a limit to groups and an expert bias" in notes and "its own choice may differ" in notes
