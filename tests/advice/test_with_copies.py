"""Copies of experts in an advice: the same counts as everywhere, and memory that layers share counted once."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from hiermoe.advice.assessment import Assessment, assess
from hiermoe.advice.case import Case
from hiermoe.advice.systems import WITHOUT_COPIES, candidates, candidates_with_copies
from hiermoe.advice.with_copies import assess_copies, summed_copies
from hiermoe.analysis.whole_step import Compute

LAYERS = 5
COPYING = ("ultraep", "eplb", "placemoe_unplanned", "moonep")


def silent(_label: str, _iteration: int) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def known(case: Case) -> Case:
    """The tiny case, of a model of five layers."""
    return replace(case, sizes=replace(case.sizes, num_layers=LAYERS))


@pytest.fixture(scope="module")
def table(known: Case) -> pd.DataFrame:
    found = assess_copies(known, candidates_with_copies(known.cluster, COPYING), silent)
    return found.set_index("system")


def test_systems_without_copies_take_what_they_take_elsewhere(
    case: Case, table: pd.DataFrame, assessment: Assessment
) -> None:
    for name in ("megatron", "hd_moe"):
        held_out = assessment.named(name).held_out.step_ms(case.cluster)
        assert table["alltoall_ms"][name] == pytest.approx(held_out.mean())
        assert table["net_ms"][name] == table["alltoall_ms"][name] and not table["copies"][name]
        assert table["layer_gb"][name] == 0


def test_busiest_gpu_is_that_of_the_held_out_iterations(case: Case, table: pd.DataFrame) -> None:
    """By hand: pairs at each GPU of every iteration that counts, experts in their first places."""
    _, judged = case.schedules
    rows_IG = np.stack(
        [case.judging.counts(i, case.first_places, case.cluster.hierarchy).pairs_GG.sum(0) for i in judged]
    )
    assert table["imbalance"]["megatron"] == pytest.approx((rows_IG.max(1) / rows_IG.mean(1)).mean())
    operations = 3 * 2 * case.sizes.expert_parameters * rows_IG.max(1).mean()
    assert table["expert_ms"]["megatron"] == pytest.approx(operations / 100e12 * 1e3)
    assert (table["layer_ms"] == table["net_ms"] + table["expert_ms"]).all()
    assert table["imbalance"]["moonep"] == pytest.approx(1.0, abs=0.01) and table["imbalance"]["megatron"] > 1.1


def test_slots_that_layers_share_count_once(case: Case, table: pd.DataFrame) -> None:
    bytes_of = {"ultraep": 2 * (2 + 4), "eplb": 2 * (2 + 2), "moonep": 4 * (2 + 4)}  # slots times bytes a parameter
    for name, each in bytes_of.items():
        assert table["layer_gb"][name] == pytest.approx(each * case.sizes.expert_parameters / 1e9)
    assert table["model_gb"]["ultraep"] == table["layer_gb"]["ultraep"]
    assert table["model_gb"]["moonep"] == table["layer_gb"]["moonep"]
    for name in ("eplb", "placemoe_unplanned"):
        assert table["model_gb"][name] == pytest.approx(LAYERS * table["layer_gb"][name])


def test_memory_of_all_layers_is_not_made_up(case: Case) -> None:
    assert case.sizes.num_layers is None
    found = assess_copies(case, candidates_with_copies(case.cluster, ["eplb", "ultraep"]), silent)
    model_gb = found.set_index("system")["model_gb"]
    assert np.isnan(model_gb["eplb"]) and model_gb["ultraep"] > 0


def test_layers_add_up_in_time_and_not_in_memory(known: Case, table: pd.DataFrame) -> None:
    summed = summed_copies([table.reset_index(), table.reset_index()]).set_index("system")
    for time in ("alltoall_ms", "net_ms", "expert_ms", "layer_ms"):
        assert summed[time].to_dict() == pytest.approx((2 * table[time]).to_dict())
    for same in ("imbalance", "layer_gb", "model_gb"):
        assert summed[same].to_dict() == pytest.approx(table[same].to_dict())
    assert summed_copies([pd.DataFrame(), pd.DataFrame()]).empty


@pytest.mark.parametrize(("names", "found"), [(["hd2"], []), (["ultraep"], [*WITHOUT_COPIES, "ultraep"])])
def test_only_systems_that_are_asked_for(case: Case, names: Sequence[str], found: list[str]) -> None:
    assert [one.name for one in candidates_with_copies(case.cluster, names)] == found


def test_all_that_are_left_out_for_their_copies_are_there_when_asked_for(case: Case) -> None:
    _, left_out = candidates(case.cluster)
    copying = {one.label for one in candidates_with_copies(case.cluster) if one.system.makes_copies}
    assert copying == {label for label, why in left_out if "copies=true" in why}


def test_nobody_pays_for_copies_without_asking(case: Case, assessment: Assessment) -> None:
    assert assessment.copies.empty
    systems, left_out = candidates(case.cluster, ["hd2"])
    asked = assess(case, systems, left_out, with_copies=candidates_with_copies(case.cluster, ["ultraep"]))
    assert asked.copies["system"].tolist() == [*WITHOUT_COPIES, "ultraep"]


def test_experts_go_at_the_rate_that_is_stated(case: Case, table: pd.DataFrame) -> None:
    stated = replace(case, compute=Compute(1, 1, 50.0, 25.0, 0.0))
    slower = assess_copies(stated, candidates_with_copies(case.cluster, ["ultraep"]), silent).set_index("system")
    assert slower["expert_ms"]["megatron"] == pytest.approx(4 * table["expert_ms"]["megatron"])
