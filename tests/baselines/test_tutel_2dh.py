"""Tutel's 2DH in all its variants, and Megatron's AlltoAll, against pairs that walk one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.megatron import alltoall
from baselines.tutel_2dh import two_dimensional
from hiermoe.planner.counts import count_routing
from hiermoe.planner.scheme import DispatchScheme, Padding, Stage, hierarchical
from hiermoe.planner.traffic import Traffic, exact_traffic
from hiermoe.routing.step import make_step
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import WORLD
from hiermoe.topology.placement import Placement
from tests.planner import reference
from tests.planner.cases import Case, cases, cases_with_copies, examples


def traffic_of(case: Case, scheme: DispatchScheme) -> Traffic:
    return exact_traffic(scheme, count_routing(case.step, case.placement, case.hierarchy), case.hierarchy)


@given(case=cases(depths=(1, 4)))
@examples(20)
def test_megatron_rows_equal_a_walk_of_every_pair(case: Case) -> None:
    walked = reference.walk_pairs(
        reference.machine(case.hierarchy, case.placement), reference.tokens_of(case.step), dimension=1
    )
    assert traffic_of(case, alltoall(case.hierarchy)[0]).rows_SGG.tolist() == walked.rows


@pytest.mark.parametrize("intra_first", [True, False])
@given(case=cases(), capacity_factor=st.sampled_from([None, 0.0, 1.0, 0.5, 2.0]))
@examples(50)
def test_rows_and_drops_equal_a_walk_of_every_pair(
    intra_first: bool, case: Case, capacity_factor: float | None
) -> None:
    scheme = two_dimensional(case.hierarchy, intra_first, capacity_factor)[0]
    traffic = traffic_of(case, scheme)
    walked = reference.tutel(
        reference.machine(case.hierarchy, case.placement), reference.tokens_of(case.step), intra_first,
        case.step.num_experts, capacity_factor,
    )  # fmt: skip
    assert traffic.rows_SGG.tolist() == walked.rows
    assert traffic.dropped_pairs == walked.dropped.total()
    assert traffic.total_pairs == walked.dropped.total() + walked.reached.total()
    assert all(times == 1 for times in walked.reached.values())


@pytest.mark.parametrize("intra_first", [True, False])
@given(case=cases_with_copies(), capacity_factor=st.sampled_from([None, 0.0, 1.0, 0.5]))
@examples(25)
def test_rows_and_drops_equal_a_walk_of_every_pair_where_experts_have_copies(
    intra_first: bool, case: Case, capacity_factor: float | None
) -> None:
    if case.hierarchy.depth == 1:
        return
    world, tokens = reference.on_slots(case.hierarchy, case.placement, case.step)
    traffic = traffic_of(case, two_dimensional(case.hierarchy, intra_first, capacity_factor)[0])
    walked = reference.tutel(world, tokens, intra_first, case.placement.num_slots, capacity_factor)
    assert traffic.rows_SGG.tolist() == walked.rows
    assert traffic.dropped_pairs == walked.dropped.total()


@given(case=cases())
@examples(20)
def test_inter_first_is_h2_and_both_orders_carry_the_same_between_nodes(case: Case) -> None:
    rows = {order: traffic_of(case, two_dimensional(case.hierarchy, order)[0]).rows_SGG for order in (True, False)}
    assert torch.equal(rows[False], traffic_of(case, hierarchical(2, False, case.hierarchy)).rows_SGG)
    node = torch.arange(case.hierarchy.num_ranks) // case.hierarchy.lanes(1)
    leaves = node[:, None] != node
    flat = traffic_of(case, alltoall(case.hierarchy)[0]).rows_SGG[0]
    assert rows[True][1][leaves].sum() == rows[False][0][leaves].sum() == flat[leaves].sum()
    assert rows[True].sum() == rows[False].sum()


def crowded() -> Case:
    """Every token of 4 GPUs wants experts 0 and 1 of 8: C = 2 * ceil(4 / 8) = 2 of 4 fit at each, from each GPU."""
    ids = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 1]]).expand(4, 4, 2)
    return Case(Hierarchy((2, 4)), Placement.identity(8), make_step(ids, torch.full((4,), 4), 8))


def test_capacity_drops_what_does_not_fit_and_says_so() -> None:
    scheme = two_dimensional(Hierarchy((2, 4)), capacity_factor=1)[0]
    assert scheme.lossy
    assert scheme.name == "tutel_2dh_padded_cf1"
    traffic = traffic_of(crowded(), scheme)
    assert (traffic.dropped_pairs, traffic.total_pairs) == (4 * 2 * 2, 32)
    assert traffic.rows_SGG[1].sum() == 4 * 8 * 2  # C rows for every (source, expert), wanted or not


def test_first_choices_fill_places_before_second_ones() -> None:
    """Of four tokens all but the third want 0 first: expert 1 keeps the third's first choice and the first's second."""
    case = crowded()
    world, tokens = reference.machine(case.hierarchy, case.placement), reference.tokens_of(case.step)
    walked = reference.tutel(world, tokens, True, 8, 1.0)
    kept = {(number, expert) for number, expert, _ in walked.reached if number < 4}
    assert kept == {(0, 0), (1, 0), (2, 1), (0, 1)}


def test_zero_capacity_factor_pads_to_the_largest_count_and_keeps_all() -> None:
    scheme = two_dimensional(Hierarchy((2, 4)), capacity_factor=0)[0]
    assert not scheme.lossy
    traffic = traffic_of(crowded(), scheme)
    assert traffic.dropped_pairs == 0
    assert traffic.rows_SGG[1].sum() == 4 * 8 * 4


def test_unpadded_is_neither_lossy_nor_deduplicating() -> None:
    for intra_first, name in ((True, "tutel_2dh"), (False, "tutel_2dh_interfirst")):
        scheme = two_dimensional(Hierarchy((2, 4)), intra_first)[0]
        assert (scheme.name, scheme.lossy, scheme.deduplicates, scheme.dimension) == (name, False, False, 2)


def test_order_decides_who_is_loaded() -> None:
    """All of GPU 0's pairs go to GPU 3: intra first gathers them at GPU 1, inter first at GPU 2."""
    ids = torch.tensor([[6, 7]]).expand(4, 5, 2)
    case = Case(Hierarchy((2, 4)), Placement.identity(8), make_step(ids, torch.tensor([5, 0, 0, 0]), 8))
    assert traffic_of(case, two_dimensional(case.hierarchy)[0]).rows_SGG[0].nonzero().tolist() == [[0, 1]]
    assert traffic_of(case, two_dimensional(case.hierarchy, False)[0]).rows_SGG[0].nonzero().tolist() == [[0, 2]]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="needs two levels, the hierarchy has 1"):
        two_dimensional(Hierarchy((8,)))
    with pytest.raises(ValueError, match="capacity_factor=-1 is negative"):
        two_dimensional(Hierarchy((2, 4)), capacity_factor=-1)
    with pytest.raises(ValueError, match="only token-expert pairs can be padded"):
        DispatchScheme("padded tokens", (Stage(WORLD, "token"),), Padding(1.0))
