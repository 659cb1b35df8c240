"""Rows that have other bytes on their way out than back, priced and recorded."""

import numpy as np
import pytest
import torch

from hiermoe.measure.predict import simulate
from hiermoe.measure.workload import open_workload
from hiermoe.model import LayerSizes, RowBytes, WireConfig
from hiermoe.planner.cost import choose_scheme, price, time_by_groups
from hiermoe.planner.counts import count_routing
from hiermoe.planner.scheme import every_dimension
from hiermoe.records.schema import CALLS
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import Bend
from hiermoe.topology.placement import Placement
from tests.conftest import Composer
from tests.planner.cases import random_step

SHORT = ("system=hiermoe", "routing=topic", "iterations=4", "tokens_per_rank=64")
EACH = RowBytes(2240, 4096, 8192, 4096)


def test_bytes_of_a_row_by_hand() -> None:
    """7168 values: FP8 with 56 scales of 4 bytes, 12 bytes for each of eight choices; 300 values take three scales."""
    sizes = LayerSizes(256, 8, 7168, 4, expert_parameters=1)
    assert list(sizes.sent.by_call) == list(CALLS)
    assert sizes.sent == RowBytes.alike(sizes.row_bytes) == RowBytes(28672, 28672, 28672, 28672)
    wire = WireConfig(dispatch="fp8_with_scales", combine="bf16", dispatch_backward="fp8_with_scales", choice_bytes=12)
    assert wire.row_bytes(7168, 4, 8) == RowBytes(7168 + 56 * 4 + 8 * 12, 14336, 28672, 7392)
    assert WireConfig(dispatch="fp8_with_scales").row_bytes(300, 2, 1).dispatch == 300 + 3 * 4


def bent(cluster: Cluster) -> Cluster:
    """With a world whose small messages lie off its line."""
    constants = cluster.constants(every_dimension(cluster.hierarchy)[0].stages[0].peers)
    bends = (Bend(below_bytes=2_000_000, ms_per_byte=1e-6),)
    return cluster.model_copy(update={"world": constants.model_copy(update={"bends": bends})})


def test_a_step_is_the_sum_of_its_alltoalls_each_with_its_own_bytes(a6000: Cluster) -> None:
    cluster = bent(a6000)
    counts = count_routing(
        random_step([64] * 32, 128, 8, torch.Generator().manual_seed(0)), Placement.identity(128), cluster.hierarchy
    )
    schemes = every_dimension(cluster.hierarchy)
    for scheme in schemes:
        alone = {call: price(scheme, counts, cluster, RowBytes.alike(n)) for call, n in EACH.by_call.items()}
        together = price(scheme, counts, cluster, EACH)
        assert 4 * together.alltoall_ms == pytest.approx(sum(one.alltoall_ms for one in alone.values()), rel=1e-12)
        for call, one in alone.items():
            assert together.calls[call] == one.calls[call]

        def busiest(level: int) -> int:
            return int(counts.needed(level).max())

        by_groups = [time_by_groups(scheme, busiest, cluster, RowBytes.alike(n)) for n in EACH.by_call.values()]
        assert 4 * time_by_groups(scheme, busiest, cluster, EACH) == pytest.approx(sum(by_groups), rel=1e-12)
    summed = [price(scheme, counts, cluster, EACH).alltoall_ms for scheme in schemes]
    assert choose_scheme(schemes, counts, cluster, EACH).scheme == schemes[int(np.argmin(summed))]


def test_small_rows_one_way_can_change_the_scheme_of_all_four(a6000: Cluster) -> None:
    """Alone, dispatch of tiny rows would go flat and combine of large ones in stages; a step has one plan."""
    counts = count_routing(
        random_step([64] * 32, 128, 8, torch.Generator().manual_seed(0)), Placement.identity(128), a6000.hierarchy
    )
    schemes = every_dimension(a6000.hierarchy)
    chosen = [
        choose_scheme(schemes, counts, a6000, sent).scheme.dimension
        for sent in (RowBytes.alike(8), RowBytes.alike(8192), RowBytes(8, 8192, 8, 8192), RowBytes(8, 60, 8, 8))
    ]
    assert chosen[0] < chosen[1] == chosen[2] and chosen[3] == chosen[0]


def test_records_have_every_alltoall_that_differs_from_dispatch(composed: Composer) -> None:
    records = simulate(open_workload(composed(*SHORT, "wire.dispatch=fp8_with_scales", "wire.choice_bytes=4")))
    calls = records[records["phase"].isin(CALLS)]
    hidden = 4096 // 2
    expected = dict.fromkeys(CALLS, 2 * hidden) | {"dispatch": hidden + hidden // 128 * 4 + 8 * 4}
    for call, row_bytes in expected.items():
        rows = calls[calls["phase"] == call]
        assert (rows["bytes"] == rows["rows"] * row_bytes).all() and len(rows)
    steps = records[records["phase"] == "step"].set_index("iteration")["predicted_ms"]
    np.testing.assert_allclose(calls.groupby("iteration")["predicted_ms"].sum(), steps, rtol=1e-12)


def test_one_size_for_all_is_what_there_was(composed: Composer) -> None:
    config = composed(*SHORT)
    assert config.keys["row_bytes"] == config.sizes.row_bytes
    records = simulate(open_workload(config))
    assert set(records["phase"]) == {"dispatch", "routing", "step"}
    bf16 = composed(*SHORT, *(f"wire.{call}=bf16" for call in CALLS))
    assert simulate(open_workload(bf16)).equals(records)
    fp8 = composed(*SHORT, *(f"wire.{call}=fp8_with_scales" for call in CALLS))
    smaller = simulate(open_workload(fp8))
    assert fp8.keys["row_bytes"] == 2048 + 16 * 4 and set(smaller["phase"]) == {"dispatch", "routing", "step"}
    faster = smaller["predicted_ms"] < records["predicted_ms"]
    assert faster[records["phase"] == "step"].all()


@pytest.mark.parametrize("wire", ["wire.combine=bf16", "wire.choice_bytes=8"])
def test_ranks_that_are_started_send_what_the_model_has(composed: Composer, wire: str) -> None:
    with pytest.raises(ValueError, match="measure=replay sends no rows of other bytes than the model's: leave wire"):
        composed("measure=replay", "ranks=local", "world_size=4", "system=hd2", "routing=uniform", wire)
