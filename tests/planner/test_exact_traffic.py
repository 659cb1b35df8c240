"""The planner's rows against tokens that walk one by one."""

from collections import Counter

import pytest
import torch
from hypothesis import given

from hiermoe.planner.bounds import any_placement_rows, busiest_rows, fixed_placement_rows
from hiermoe.planner.counts import count_routing, sort_choices
from hiermoe.planner.scheme import DispatchScheme, Stage, hierarchical
from hiermoe.planner.traffic import exact_traffic
from hiermoe.routing.step import make_step
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import WORLD, Peers
from hiermoe.topology.placement import Placement
from tests.planner import reference
from tests.planner.cases import Case, cases, cases_with_copies, examples


def walk(case: Case, dimension: int, deduplicate: bool) -> reference.Dispatch:
    walker = reference.walk_tokens if deduplicate else reference.walk_pairs
    return walker(reference.machine(case.hierarchy, case.placement), reference.tokens_of(case.step), dimension)


def rows_of(case: Case, dimension: int, deduplicate: bool) -> torch.Tensor:
    counts = count_routing(case.step, case.placement, case.hierarchy)
    return exact_traffic(hierarchical(dimension, deduplicate, case.hierarchy), counts, case.hierarchy).rows_SGG


@given(case=cases(depths=(1, 5)))
@examples(80)
def test_rows_equal_a_walk_of_every_token(case: Case) -> None:
    counts = count_routing(case.step, case.placement, case.hierarchy)
    for dimension in range(1, case.hierarchy.depth + 1):
        for deduplicate in (False, True):
            traffic = exact_traffic(hierarchical(dimension, deduplicate, case.hierarchy), counts, case.hierarchy)
            assert traffic.rows_SGG.tolist() == walk(case, dimension, deduplicate).rows
            assert traffic.dropped_pairs == 0
            assert traffic.total_pairs == case.step.expert_ids_NK.numel()


@given(case=cases_with_copies())
@examples(60)
def test_rows_equal_a_walk_of_every_token_where_experts_have_copies(case: Case) -> None:
    counts = count_routing(case.step, case.placement, case.hierarchy)
    world, tokens = reference.on_slots(case.hierarchy, case.placement, case.step)
    for level in range(1, case.hierarchy.depth + 1):
        assert counts.needed(level).tolist() == reference.distinct_tokens(world, tokens, level)
        for source in range(case.hierarchy.num_ranks):
            own = [token for token in tokens if token[0] == source]
            assert counts.tokens[level - 1][source].tolist() == reference.distinct_tokens(world, own, level)
    pairs = Counter((source, slot) for source, slots in tokens for slot in slots)
    assert {key: n for key, n in enumerate(counts.pairs_GS.view(-1).tolist()) if n} == {
        source * case.placement.num_slots + slot: n for (source, slot), n in pairs.items()
    }
    for dimension in range(1, case.hierarchy.depth + 1):
        for deduplicate in (False, True):
            walker = reference.walk_tokens if deduplicate else reference.walk_pairs
            assert rows_of(case, dimension, deduplicate).tolist() == walker(world, tokens, dimension).rows


def test_copies_need_a_source_and_as_many_slots_on_every_gpu() -> None:
    ids_NK, two = torch.zeros(1, 1, dtype=torch.int64), Hierarchy((2,))
    placement = Placement(torch.tensor([0, 1, 0, 0]), torch.tensor([[0, 1], [2, 1]]))
    assert sort_choices(ids_NK, placement, two, torch.tensor([1])).rank_NK.tolist() == [[1]]
    with pytest.raises(ValueError, match="a copy depends on the source"):
        sort_choices(ids_NK, placement, two)
    with pytest.raises(ValueError, match="num_slots=3 is not divisible by ep_size=2"):
        count_routing(
            make_step(ids_NK[None].expand(2, 1, 1), torch.ones(2, dtype=torch.int64), 2),
            Placement(torch.tensor([0, 1, 0]), torch.tensor([[0, 1], [2, 1]])),
            two,
        )
    with pytest.raises(ValueError, match="4 ranks, the placement has copies for 2"):
        count_routing(
            make_step(ids_NK[None].expand(4, 1, 1), torch.ones(4, dtype=torch.int64), 2), placement, Hierarchy((4,))
        )


@given(case=cases())
@examples(20)
def test_walks_reach_every_expert_exactly_once(case: Case) -> None:
    """The references themselves deliver, so that equal rows mean something."""
    world = reference.machine(case.hierarchy, case.placement)
    wanted = {
        (number, expert, world.gpu_of[expert])
        for number, (_, experts) in enumerate(reference.tokens_of(case.step))
        for expert in experts
    }
    for dimension in range(1, case.hierarchy.depth + 1):
        for deduplicate in (False, True):
            dispatch = walk(case, dimension, deduplicate)
            assert set(dispatch.reached) == wanted
            assert all(times == 1 for times in dispatch.reached.values())
            if deduplicate:
                assert all(times == 1 for times in dispatch.final_rows.values())


@given(case=cases())
@examples(25)
def test_last_stage_brings_each_token_once_to_each_gpu_that_needs_it(case: Case) -> None:
    rank_of_E = case.placement.rank_of(case.hierarchy.num_ranks)
    needs = [(n, gpu) for n, gpus in enumerate(rank_of_E[case.step.expert_ids_NK].tolist()) for gpu in gpus]
    wanted, pairs = Counter(gpu for _, gpu in set(needs)), Counter(gpu for _, gpu in needs)
    wanted_G = [wanted[rank] for rank in range(case.hierarchy.num_ranks)]
    pairs_G = [pairs[rank] for rank in range(case.hierarchy.num_ranks)]
    for dimension in range(1, case.hierarchy.depth + 1):
        assert rows_of(case, dimension, True)[-1].sum(0).tolist() == wanted_G
        assert rows_of(case, dimension, False)[-1].sum(0).tolist() == pairs_G


@given(case=cases())
@examples(25)
def test_no_row_appears_or_vanishes_between_stages(case: Case) -> None:
    topk = case.step.topk
    tokens_G = torch.bincount(case.step.source_N, minlength=case.hierarchy.num_ranks)
    for dimension in range(1, case.hierarchy.depth + 1):
        pairs_SGG, tokens_SGG = rows_of(case, dimension, False), rows_of(case, dimension, True)
        assert torch.equal(pairs_SGG[0].sum(1), tokens_G * topk)
        assert (tokens_SGG[0].sum(1) >= tokens_G).all()
        for stage in range(dimension - 1):
            assert torch.equal(pairs_SGG[stage].sum(0), pairs_SGG[stage + 1].sum(1))
            arrived_G, sent_G = tokens_SGG[stage].sum(0), tokens_SGG[stage + 1].sum(1)
            assert (sent_G >= arrived_G).all() and (sent_G <= arrived_G * topk).all()
        assert (tokens_SGG.sum((1, 2)) <= pairs_SGG.sum((1, 2))).all()


@given(case=cases())
@examples(25)
def test_bounds_hold_and_two_stages_reach_the_fixed_one(case: Case) -> None:
    counts = count_routing(case.step, case.placement, case.hierarchy)
    hierarchy, experts = case.hierarchy, case.step.num_experts
    num_tokens = len(case.step.source_N)
    for level in range(1, hierarchy.depth + 1):
        fixed = fixed_placement_rows(counts, level)
        assert any_placement_rows(num_tokens, case.step.topk, experts, hierarchy, level) <= fixed
        if level < hierarchy.depth:
            for dimension in range(level + 1, hierarchy.depth + 1):
                rows_GG = rows_of(case, dimension, True)[level - 1]
                assert int(rows_GG.sum()) == fixed
                assert int(rows_GG.sum(0).max()) >= busiest_rows(fixed, hierarchy.num_ranks)
    assert int(rows_of(case, 1, True).sum()) == fixed_placement_rows(counts, hierarchy.depth)


def test_any_placement_bound_is_reached_by_tokens_of_neighbouring_experts() -> None:
    hierarchy = Hierarchy((2, 4, 8))
    ids = torch.arange(4)[None, None, :].expand(8, 3, 4) + 8 * (torch.arange(8) % 2)[:, None, None]
    counts = count_routing(make_step(ids, torch.full((8,), 3), 16), Placement.identity(16), hierarchy)
    for level in (1, 2, 3):
        assert fixed_placement_rows(counts, level) == any_placement_rows(24, 4, 16, hierarchy, level)
    assert fixed_placement_rows(counts, 3) == 48


def test_busiest_gpu_has_an_even_share_at_least() -> None:
    assert [busiest_rows(rows, 4) for rows in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


@given(case=cases())
@examples(20)
def test_deduplication_never_adds_rows(case: Case) -> None:
    hd1, h1 = rows_of(case, 1, True), rows_of(case, 1, False)
    assert (hd1 <= h1).all()


@given(case=cases())
@examples(20)
def test_stages_keep_to_their_communicators(case: Case) -> None:
    hierarchy = case.hierarchy
    rank = torch.arange(hierarchy.num_ranks)
    for dimension in range(2, hierarchy.depth + 1):
        for deduplicate in (False, True):
            rows_SGG = rows_of(case, dimension, deduplicate)
            for level in range(1, dimension):
                outer, lanes = rank // hierarchy.lanes(level - 1), rank % hierarchy.lanes(level)
                allowed = (outer[:, None] == outer) & (lanes[:, None] == lanes)
                assert not rows_SGG[level - 1][~allowed].any()
            inner = rank // hierarchy.lanes(dimension - 1)
            assert not rows_SGG[-1][inner[:, None] != inner].any()


def four_gpus() -> tuple[Hierarchy, Placement]:
    """Two nodes of two GPUs, two experts a GPU."""
    return Hierarchy((2, 4)), Placement.identity(8)


def test_rows_of_one_token_by_hand() -> None:
    """GPU 1 holds a token for experts 4, 5 (GPU 2), 6 (GPU 3) and 0 (GPU 0)."""
    hierarchy, placement = four_gpus()
    step = make_step(torch.tensor([[4, 6, 5, 0]]).expand(4, 1, 4), torch.tensor([0, 1, 0, 0]), 8)
    counts = count_routing(step, placement, hierarchy)

    def rows(dimension: int, deduplicate: bool) -> dict[tuple[int, int, int], int]:
        found = exact_traffic(hierarchical(dimension, deduplicate, hierarchy), counts, hierarchy).rows_SGG
        return {(s, a, b): int(found[s, a, b]) for s, a, b in found.nonzero().tolist()}

    assert rows(1, False) == {(0, 1, 0): 1, (0, 1, 2): 2, (0, 1, 3): 1}
    assert rows(1, True) == {(0, 1, 0): 1, (0, 1, 2): 1, (0, 1, 3): 1}
    # To the same lane of the other node, GPU 3, and what is for its own node stays on GPU 1.
    assert rows(2, False) == {(0, 1, 1): 1, (0, 1, 3): 3, (1, 1, 0): 1, (1, 3, 2): 2, (1, 3, 3): 1}
    assert rows(2, True) == {(0, 1, 1): 1, (0, 1, 3): 1, (1, 1, 0): 1, (1, 3, 2): 1, (1, 3, 3): 1}


def test_busiest_and_crossing_rows() -> None:
    hierarchy, placement = four_gpus()
    step = make_step(torch.tensor([[4, 6, 5, 0]]).expand(4, 1, 4), torch.tensor([0, 1, 0, 1]), 8)
    traffic = exact_traffic(hierarchical(2, True, hierarchy), count_routing(step, placement, hierarchy), hierarchy)
    # Both GPUs of lane 1 keep a copy and swap one: 2 rows at each. Then GPU 1 serves GPU 0, GPU 3 serves 2 and itself.
    assert traffic.busiest_rows().tolist() == [2, 2]
    assert traffic.crossing_rows().tolist() == [2, 4]


def test_duplication_rate_by_hand() -> None:
    hierarchy, placement = four_gpus()
    step = make_step(torch.tensor([[4, 6, 5, 0]]).expand(4, 1, 4), torch.tensor([0, 1, 0, 0]), 8)
    counts = count_routing(step, placement, hierarchy)
    assert counts.duplication_rate(1) == pytest.approx(1 - 2 / 4)
    assert counts.duplication_rate(2) == pytest.approx(1 - 3 / 4)


def test_a_step_without_tokens_moves_nothing() -> None:
    hierarchy, placement = four_gpus()
    step = make_step(torch.zeros(4, 1, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), 8)
    counts = count_routing(step, placement, hierarchy)
    for dimension in (1, 2):
        assert not exact_traffic(hierarchical(dimension, True, hierarchy), counts, hierarchy).rows_SGG.any()
    assert counts.duplication_rate(1) != counts.duplication_rate(1)  # NaN: a rate of nothing


def test_experts_must_divide_among_gpus() -> None:
    step = make_step(torch.zeros(4, 1, 1, dtype=torch.int64), torch.ones(4, dtype=torch.int64), 10)
    with pytest.raises(ValueError, match="num_experts=10 is not divisible by ep_size=4"):
        count_routing(step, Placement.identity(10), Hierarchy((2, 4)))


def test_routing_must_fit_hierarchy_and_placement() -> None:
    step = make_step(torch.zeros(4, 1, 1, dtype=torch.int64), torch.ones(4, dtype=torch.int64), 8)
    with pytest.raises(ValueError, match="4 ranks, the hierarchy has 8"):
        count_routing(step, Placement.identity(8), Hierarchy((2, 8)))
    with pytest.raises(ValueError, match="8 experts, the placement has 16"):
        count_routing(step, Placement.identity(16), Hierarchy((2, 4)))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((Stage(Peers("inter", 1), "pair"),), "does not bring every row to its destination"),
        ((Stage(Peers("intra", 1), "token"),), "does not bring every row to its destination"),
        ((Stage(Peers("inter", 2), "pair"), Stage(Peers("inter", 1), "pair")), "does not bring every row"),
        ((Stage(Peers("intra", 1), "pair"), Stage(WORLD, "pair")), None),
        ((Stage(Peers("intra", 1), "token"), Stage(Peers("inter", 1), "token")), "once per group"),
        ((Stage(Peers("intra", 1), "pair"), Stage(Peers("inter", 1), "token")), "can send it whole"),
    ],
)
def test_a_scheme_that_does_not_deliver_is_refused(stages: tuple[Stage, ...], message: str | None) -> None:
    hierarchy = Hierarchy((2, 4, 8))
    step = make_step(torch.zeros(8, 1, 1, dtype=torch.int64), torch.ones(8, dtype=torch.int64), 8)
    counts = count_routing(step, Placement.identity(8), hierarchy)
    if message is None:  # over the world everything arrives, wherever it is
        assert exact_traffic(DispatchScheme("odd", stages), counts, hierarchy).rows_SGG[-1].sum(0)[0] == 8
        return
    with pytest.raises(ValueError, match=message):
        exact_traffic(DispatchScheme("broken", stages), counts, hierarchy)


def test_a_scheme_needs_stages() -> None:
    with pytest.raises(ValueError, match="has no stages"):
        DispatchScheme("empty", ())
