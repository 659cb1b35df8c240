"""Several chunks: their price against a schedule walked through chunk by chunk, and what Algorithm 1 makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from hiermoe.model import RowBytes
from hiermoe.planner.cost import choose_scheme, price, time_of_alltoall
from hiermoe.planner.counts import count_routing
from hiermoe.planner.scheme import DispatchScheme, Stage, hierarchical, pipelined
from hiermoe.records.status import NotApplicable
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import WORLD, AlphaBeta, Bend, Peers
from hiermoe.topology.placement import Placement
from tests.planner.cases import random_step

CLUSTER = Cluster.named("a6000_4x8").model_copy(update={"overlap": 1.0})
HIERARCHY = CLUSTER.hierarchy
COUNTS = count_routing(
    random_step([40] * 32, 64, 8, torch.Generator().manual_seed(3)), Placement.identity(64), HIERARCHY
)
ROW_BYTES = 4096


def walked_through(chunk_ms: Sequence[float], chunks: int) -> float:
    """When the last chunk is through, every stage taking one chunk at a time and each chunk one stage at a time."""
    free_at = [0.0] * len(chunk_ms)
    for _ in range(chunks):
        ready_at = 0.0
        for stage, ms in enumerate(chunk_ms):
            ready_at = free_at[stage] = max(ready_at, free_at[stage]) + ms
    return free_at[-1]


@pytest.mark.parametrize("chunks", [1, 2, 3, 8])
@pytest.mark.parametrize("stage_ms", [(3.0, 5.0), (5.0, 3.0), (1.0, 7.0, 2.0), (4.0, 4.0, 4.0), (0.0, 6.0)])
def test_full_overlap_is_the_schedule_walked_through(stage_ms: tuple[float, ...], chunks: int) -> None:
    scheme = replace(hierarchical(len(stage_ms), True, HIERARCHY), chunks=chunks)
    found = time_of_alltoall(scheme, stage_ms, CLUSTER)
    assert found == pytest.approx(walked_through([ms / chunks for ms in stage_ms], chunks))
    tensor = time_of_alltoall(scheme, [torch.tensor(ms) for ms in stage_ms], CLUSTER)
    array = time_of_alltoall(scheme, [np.array([ms]) for ms in stage_ms], CLUSTER)
    assert float(tensor) == pytest.approx(found) and array.tolist() == [pytest.approx(found)]


def test_no_overlap_is_the_sum_and_half_is_half_way() -> None:
    scheme, stage_ms = hierarchical(3, True, HIERARCHY, chunks=4), (2.0, 6.0, 1.0)
    none, half, full = (
        time_of_alltoall(scheme, stage_ms, CLUSTER.model_copy(update={"overlap": share})) for share in (0.0, 0.5, 1.0)
    )
    assert none == pytest.approx(9.0) and half == pytest.approx((none + full) / 2)


def test_every_chunk_starts_up_and_small_ones_lie_off_the_line() -> None:
    line = AlphaBeta(
        alpha_ms=2.0, beta_ms_per_byte=0.01, source="hand", bends=(Bend(below_bytes=300, ms_per_byte=0.1),)
    )
    assert line.ms(400.0) == pytest.approx(6.0)
    assert line.ms(400.0, parts=2) == pytest.approx(2 * line.ms(200.0)) == pytest.approx(2 * (2 + 2 + 10))
    scheme = hierarchical(2, True, HIERARCHY, chunks=4)
    one, four = (price(x, COUNTS, CLUSTER, RowBytes.alike(ROW_BYTES)) for x in (replace(scheme, chunks=1), scheme))
    of_one, of_four = one.calls["dispatch"], four.calls["dispatch"]
    assert of_four.stage_bytes == of_one.stage_bytes and torch.equal(four.traffic.rows_SGG, one.traffic.rows_SGG)
    for stage, before, after in zip(scheme.stages, of_one.stage_ms, of_four.stage_ms, strict=True):
        assert after - before == pytest.approx(3 * CLUSTER.constants(stage.peers).alpha_ms)


def test_waves_that_take_a_while_are_a_least_time_and_starts_then_count_once() -> None:
    scheme = hierarchical(2, True, HIERARCHY, chunks=4)
    quick, slow = (CLUSTER.model_copy(update={"wave_ms": ms}) for ms in (0.0, 1e3))
    of_quick, of_slow, of_one = (
        price(x, COUNTS, cluster, RowBytes.alike(ROW_BYTES)).calls["dispatch"]
        for x, cluster in ((scheme, quick), (scheme, slow), (replace(scheme, chunks=1), slow))
    )
    assert of_quick.stage_ms == of_slow.stage_ms == of_one.stage_ms
    assert of_quick.alltoall_ms == pytest.approx(sum(of_one.stage_ms) - min(of_one.stage_ms) * 3 / 4)
    assert of_slow.alltoall_ms == pytest.approx(5 * 1e3, rel=1e-3) and of_slow.alltoall_ms > 5e3
    assert of_one.alltoall_ms == sum(of_one.stage_ms)
    candidates = pipelined(HIERARCHY)
    assert choose_scheme(candidates, COUNTS, slow, RowBytes.alike(2**20)).scheme.chunks == 1


def test_long_rows_are_cut_and_short_ones_are_not() -> None:
    candidates = pipelined(HIERARCHY)
    assert [x.name for x in candidates[:6]] == ["HD1", "HD2", "HD2x2", "HD2x4", "HD2x8", "HD3"]
    assert [x.name for x in candidates[6:]] == ["HD4"]
    chosen = [choose_scheme(candidates, COUNTS, CLUSTER, RowBytes.alike(row_bytes)) for row_bytes in (2, 2**20)]
    assert chosen[0].scheme.chunks == 1 < chosen[1].scheme.chunks
    for one, row_bytes in zip(chosen, (2, 2**20), strict=True):
        every = [price(x, COUNTS, CLUSTER, RowBytes.alike(row_bytes)).alltoall_ms for x in candidates]
        assert one.alltoall_ms == min(every)
    fixed = CLUSTER.model_copy(update={"overlap": 0.0})
    assert choose_scheme(candidates, COUNTS, fixed, RowBytes.alike(2**20)).scheme.chunks == 1


def test_nothing_is_promised_of_stages_whose_overlap_is_not_known() -> None:
    unknown = CLUSTER.model_copy(update={"overlap": None})
    with pytest.raises(NotApplicable, match="does not say how far its stages overlap"):
        price(hierarchical(2, True, HIERARCHY, chunks=2), COUNTS, unknown, RowBytes.alike(ROW_BYTES))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stage(WORLD, "tokens"), "rows=tokens is unknown; did you mean token"),  # type: ignore[arg-type]
        (lambda: Stage(WORLD, "banana"), "rows=banana is unknown; choose from pair, token"),  # type: ignore[arg-type]
        (lambda: Peers("across", 1), "peers=across is unknown; choose from inter, intra"),  # type: ignore[arg-type]
    ],
)
def test_a_stage_of_other_words_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_chunks_of_a_single_stage_have_no_meaning() -> None:
    with pytest.raises(ValueError, match="chunks=2 of 1 stages"):
        DispatchScheme("HD1", (Stage(WORLD, "token"),), chunks=2)
    with pytest.raises(ValueError, match="chunks=0"):
        hierarchical(2, True, HIERARCHY, chunks=0)
