"""Tokens that choose their copies: as a token alone would by hand, never to more groups than their source's choice."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiermoe.topology.fewest_groups import FewestGroups
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.planner.cases import Case, cases, examples, random_copies, with_quotas
from tests.planner.reference import tokens_of, visited, with_slots


@st.composite
def gathering_cases(draw: st.DrawFn) -> Case:
    """Copies anywhere, chosen in tables or by quotas, of which tokens choose."""
    case = draw(cases(depths=(1, 4), most_tokens=8))
    experts, ranks = case.step.num_experts, case.hierarchy.num_ranks
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    placement = random_copies(experts, experts + ranks * draw(st.integers(1, 5)), ranks, generator)
    if draw(st.booleans()):
        placement = with_quotas(placement, draw(st.sampled_from([1, 4, 100])), generator)
    return Case(case.hierarchy, replace(placement, gathered_in=case.hierarchy), case.step)


@given(case=gathering_cases())
@examples(150)
def test_tokens_choose_as_one_by_one_and_never_go_to_more_groups(case: Case) -> None:
    ids_NK, source_N, placement = case.step.expert_ids_NK, case.step.source_N, case.placement
    chosen_NK = placement.slots_of(ids_NK, source_N)
    assert torch.equal(placement.expert_at_S[chosen_NK], ids_NK)  # each of its experts, once
    found = [tuple(row) for row in chosen_NK.tolist()]
    assert found == [slots for _, slots in with_slots(placement, tokens_of(case.step))]
    table_NK = replace(placement, gathered_in=None).slots_of(ids_NK, source_N)
    per_gpu = placement.per_rank(case.hierarchy.num_ranks)
    for mine, named in zip(found, table_NK.tolist(), strict=True):
        after, before = visited(case.hierarchy, per_gpu, mine), visited(case.hierarchy, per_gpu, tuple(named))
        assert after < before or mine == tuple(named)  # the outermost level counts first
    fewest = placement.fewest_groups
    assert fewest is not None
    counts = [visited(case.hierarchy, per_gpu, mine) for mine in found]
    assert fewest.distinct(chosen_NK).T.tolist() == counts


@given(case=gathering_cases())
@examples(60)
def test_a_rank_chooses_with_its_own_tokens_alone(case: Case) -> None:
    ids_NK, source_N, placement = case.step.expert_ids_NK, case.step.source_N, case.placement
    together_NK = placement.slots_of(ids_NK, source_N)
    for rank in range(case.hierarchy.num_ranks):
        mine = source_N == rank
        assert torch.equal(placement.slots_of(ids_NK[mine], source_N[mine]), together_NK[mine])


@given(case=gathering_cases())
@examples(60)
def test_greedy_is_at_most_a_logarithm_from_the_best(case: Case) -> None:
    """Of the outermost level, against all choices of copies; one group that has all is always found."""
    placement, topk = case.placement, case.step.topk
    outer = case.hierarchy.groups[0]
    per_group = placement.num_slots // outer
    most = sum(1 / n for n in range(1, topk + 1))
    groups = [
        {slot // per_group for slot, held in enumerate(placement.expert_at_S.tolist()) if held == expert}
        for expert in range(case.step.num_experts)
    ]
    chosen_NK = placement.slots_of(case.step.expert_ids_NK, case.step.source_N)
    for ids, mine in zip(case.step.expert_ids_NK.tolist(), chosen_NK.tolist(), strict=True):
        sizes = range(1, min(topk, outer) + 1)
        every = (set(which) for n in sizes for which in combinations(range(outer), n))
        best = next(len(which) for which in every if all(groups[expert] & which for expert in ids))
        found = len({slot // per_group for slot in mine})
        assert found <= best * most and (found == 1) == (best == 1)


def test_tokens_meet_where_most_of_their_experts_are_and_ties_stay_near() -> None:
    two = Hierarchy((2, 4))  # slots 0..1 | 2..3 || 4..5 | 6..7
    expert_at_S = torch.tensor([0, 1, 2, 3, 0, 1, 2, 4])
    far_GE = torch.tensor([[4, 5, 6, 3, 7]]).repeat(4, 1)  # copies in node 1 wherever there is one
    near = Placement(expert_at_S, far_GE, gathered_in=two)
    ids_NK, source_N = torch.tensor([[0, 1], [0, 3], [2, 4], [0, 2]]), torch.tensor([0, 0, 0, 0])
    # One GPU as named, if not the own one; to node 0, where expert 3 is alone; as named; as named, GPUs 2 and 3.
    assert near.slots_of(ids_NK, source_N).tolist() == [[4, 5], [0, 3], [6, 7], [4, 6]]
    mixed = Placement(expert_at_S, torch.tensor([[0, 5, 2, 3, 7]]).repeat(4, 1), gathered_in=two)
    assert mixed.slots_of(ids_NK[:1].repeat(4, 1), torch.arange(4)).tolist() == [[0, 1], [0, 1], [4, 5], [4, 5]]


def test_a_token_without_some_choice_has_none() -> None:
    hierarchy = Hierarchy((2, 4))
    fewest = FewestGroups.of(torch.tensor([0, 1, 1, 0]), 2, hierarchy)
    ids_NK, named_NK = torch.tensor([[0, 2], [2, 2], [0, 1]]), torch.tensor([[0, 4], [4, 4], [0, 2]])
    assert fewest.slots_of(ids_NK, torch.tensor([0, 1, 0]), named_NK).tolist() == [[0, 4], [4, 4], [0, 1]]
    assert fewest.slots_of(ids_NK[:0], torch.arange(0), named_NK[:0]).shape == (0, 2)
    with pytest.raises(ValueError, match="topk=31 is above 30"):
        fewest.slots_of(torch.full((1, 31), 2), torch.tensor([0]), torch.full((1, 31), 4))


def test_a_hierarchy_enters_the_key_and_must_fit() -> None:
    expert_at_S, copy_GE = torch.tensor([0, 1, 1, 0]), torch.tensor([[0, 1], [3, 2]])
    keys = {Placement(expert_at_S, copy_GE, gathered_in=how).key for how in (None, Hierarchy((2,)), Hierarchy((1, 2)))}
    assert len(keys) == 3
    with pytest.raises(ValueError, match="gathered_in has 4 GPUs, beside a copy_GE of 2 for 4 slots"):
        Placement(expert_at_S, copy_GE, gathered_in=Hierarchy((4,)))
    with pytest.raises(ValueError, match="gathered_in has 2 GPUs, beside a copy_GE of 0"):
        Placement(torch.tensor([0, 1]), gathered_in=Hierarchy((2,)))
