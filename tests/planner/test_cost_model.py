"""Prices worked out by hand, and Algorithm 1."""

import pytest
import torch

from baselines.megatron import alltoall
from baselines.tutel_2dh import two_dimensional
from hiermoe.model import RowBytes
from hiermoe.planner.cost import choose_scheme, price
from hiermoe.planner.counts import RoutingCounts, count_routing
from hiermoe.planner.scheme import DispatchScheme, every_dimension, fixed_dimension, hierarchical
from hiermoe.records.status import NotApplicable
from hiermoe.routing.step import make_step
from hiermoe.topology.cluster import Cluster, Level
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import AlphaBeta
from hiermoe.topology.placement import Placement
from tests.planner.cases import random_step

HIERARCHY = Hierarchy((2, 4))
ROW_BYTES = 10


def constants(alpha_ms: float, beta_ms_per_byte: float) -> AlphaBeta:
    return AlphaBeta(alpha_ms=alpha_ms, beta_ms_per_byte=beta_ms_per_byte, source="hand")


def two_nodes(world_alpha_ms: float = 1.0) -> Cluster:
    return Cluster(
        name="hand",
        description="2 nodes of 2 GPUs",
        world=constants(world_alpha_ms, 0.1),
        levels=(
            Level(name="node", groups=2, link_gb_per_s=1.0, inter=constants(2.0, 0.05), intra=constants(3.0, 0.02)),
            Level(name="gpu", groups=4, link_gb_per_s=1.0),
        ),
    )


def five_tokens() -> RoutingCounts:
    """Experts 01 | 23 | 45 | 67; GPU 0 holds tokens {4, 5} and {4, 6}, GPU 1 {5, 7}, GPU 2 {0, 4}, GPU 3 none."""
    ids = torch.tensor([[[4, 5], [6, 4]], [[7, 5], [0, 0]], [[0, 4], [0, 0]], [[0, 0], [0, 0]]])
    return count_routing(make_step(ids, torch.tensor([2, 1, 1, 0]), 8), Placement.identity(8), HIERARCHY)


def test_price_of_every_scheme_by_hand() -> None:
    cluster, counts = two_nodes(), five_tokens()

    def stages(scheme: DispatchScheme) -> list[tuple[float, object]]:
        priced = price(scheme, counts, cluster, RowBytes.alike(ROW_BYTES))
        dispatch = priced.calls["dispatch"]
        assert priced.alltoall_ms == pytest.approx(sum(dispatch.stage_ms))
        return [(n, pytest.approx(ms)) for n, ms in zip(dispatch.stage_bytes, dispatch.stage_ms, strict=True)]

    # Flat: GPU 2 receives pairs 4, 5, 4, 5, 4; its first token once where rows are tokens. 1 + 0.1 n.
    assert stages(alltoall(HIERARCHY)[0]) == [(50, 6.0)]
    assert stages(hierarchical(1, False, HIERARCHY)) == [(50, 6.0)]
    assert stages(hierarchical(1, True, HIERARCHY)) == [(40, 5.0)]
    # Between nodes, 2 + 0.05 n: GPU 2 gets all that GPU 0 sends across (4 pairs, 2 tokens) and keeps one of its own.
    # Inside, 3 + 0.02 n: GPU 2 gets what it needs, as above.
    assert stages(hierarchical(2, False, HIERARCHY)) == [(50, 4.5), (50, 4.0)]
    assert stages(hierarchical(2, True, HIERARCHY)) == [(30, 3.5), (40, 3.8)]
    # Intra first: to the own node's GPU of the destination's lane. GPU 0 gathers 4, 5, 4 of its own and 5 of GPU 1.
    assert stages(two_dimensional(HIERARCHY)[0]) == [(40, 3.8), (50, 4.5)]
    assert stages(two_dimensional(HIERARCHY, intra_first=False)[0]) == [(50, 4.5), (50, 4.0)]
    # Padded: GPU 0 wants expert 4 twice, so every (source, expert) takes 2 rows: 4 rows to each GPU from each GPU.
    # Inside, each GPU gathers for 2 GPUs of its lane from 2 sources: 16. Between nodes: 4 from each of 4 sources: 16.
    assert stages(two_dimensional(HIERARCHY, capacity_factor=0)[0]) == [(160, 6.2), (160, 10.0)]


def test_algorithm_one_takes_the_cheapest() -> None:
    counts = five_tokens()
    assert (
        choose_scheme(every_dimension(HIERARCHY), counts, two_nodes(), RowBytes.alike(ROW_BYTES)).scheme.name == "HD1"
    )  # 5.0 < 7.3
    # A start-up of 4 ms more makes the flat one the dearer.
    chosen = choose_scheme(every_dimension(HIERARCHY), counts, two_nodes(world_alpha_ms=5.0), RowBytes.alike(ROW_BYTES))
    assert (chosen.scheme.name, chosen.scheme.dimension) == ("HD2", 2)
    assert chosen.alltoall_ms == pytest.approx(7.3)


def test_algorithm_one_takes_the_first_of_equals() -> None:
    counts = five_tokens()
    candidates = (hierarchical(2, True, HIERARCHY), alltoall(HIERARCHY)[0], hierarchical(1, False, HIERARCHY))
    assert choose_scheme(candidates, counts, two_nodes(), RowBytes.alike(ROW_BYTES)).scheme.name == "megatron"
    assert choose_scheme(candidates[::-1], counts, two_nodes(), RowBytes.alike(ROW_BYTES)).scheme.name == "H1"


def test_algorithm_one_never_exceeds_any_fixed_dimension(a6000: Cluster) -> None:
    for seed, skew in enumerate((0.0, 0.5, 2.0)):
        step = random_step([64] * 32, 128, 8, torch.Generator().manual_seed(seed), skew)
        counts = count_routing(step, Placement.identity(128), a6000.hierarchy)
        chosen = choose_scheme(every_dimension(a6000.hierarchy), counts, a6000, RowBytes.alike(4096))
        prices = [
            price(scheme, counts, a6000, RowBytes.alike(4096)).alltoall_ms
            for scheme in every_dimension(a6000.hierarchy)
        ]
        assert chosen.alltoall_ms == min(prices)
        assert chosen.scheme.dimension == prices.index(min(prices)) + 1


def test_flat_pairs_are_megatron() -> None:
    for hierarchy in (HIERARCHY, Hierarchy((4, 8, 16, 32))):
        assert hierarchical(1, False, hierarchy).stages == alltoall(hierarchy)[0].stages


def test_dimensions_beyond_the_hierarchy_are_not_applicable() -> None:
    for dimension in (0, 3, -1):
        with pytest.raises(NotApplicable, match=f"dimension={dimension} is outside 1..2"):
            hierarchical(dimension, True, HIERARCHY)
        with pytest.raises(NotApplicable):
            fixed_dimension(HIERARCHY, dimension)


def test_candidates_are_all_dimensions_in_order() -> None:
    schemes = every_dimension(Hierarchy((4, 8, 16, 32)))
    assert [(s.name, s.dimension, s.deduplicates, s.lossy) for s in schemes] == [
        (f"HD{d}", d, True, False) for d in (1, 2, 3, 4)
    ]
    assert [str(stage.peers) for stage in schemes[3].stages] == ["inter1", "inter2", "inter3", "intra3"]
    assert not hierarchical(2, False, HIERARCHY).deduplicates
