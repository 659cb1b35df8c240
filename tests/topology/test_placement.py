"""A placement is a permutation, and swaps keep it one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiermoe.topology.placement import Placement
from tests.planner.cases import examples, random_copies, with_quotas
from tests.planner.reference import with_slots

permutations = st.integers(1, 24).flatmap(lambda n: st.permutations(list(range(n))))


@given(slots=permutations)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_expert_at_a_slot_has_that_slot(slots: list[int]) -> None:
    placement = Placement.of_slots(torch.tensor(slots))
    assert placement.num_experts == len(slots)
    assert placement.slot_E[placement.expert_at_S].tolist() == list(range(len(slots)))
    assert placement.is_identity == (slots == sorted(slots))


@given(slots=permutations, data=st.data())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_swap_exchanges_two_experts_and_undoes_itself(slots: list[int], data: st.DataObject) -> None:
    a, b = (data.draw(st.integers(0, len(slots) - 1)) for _ in range(2))
    before = Placement.of_slots(torch.tensor(slots))
    after = before.swapped(a, b)
    assert (after.slot_E[a], after.slot_E[b]) == (before.slot_E[b], before.slot_E[a])
    untouched = [e for e in range(len(slots)) if e not in (a, b)]
    assert torch.equal(after.slot_E[untouched], before.slot_E[untouched])
    assert torch.equal(after.swapped(a, b).slot_E, before.slot_E)
    assert before.slot_E.tolist() == slots


def test_gpu_owns_neighbouring_slots() -> None:
    assert Placement.identity(8).rank_of(4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert Placement.of_slots(torch.tensor([3, 2, 1, 0])).rank_of(2).tolist() == [1, 1, 0, 0]


def test_experts_that_do_not_fit_the_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="num_experts=130 is not divisible by ep_size=32"):
        Placement.identity(130).rank_of(32)


@pytest.mark.parametrize(
    "slot_E", [torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([0, -1]), torch.tensor([0.0, 1.0])]
)
def test_what_is_no_permutation_is_refused(slot_E: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"slot_E=\[.*\] is not an int64 permutation of 0\.\.1"):
        Placement.of_slots(slot_E)


def test_moves_tell_one_placement_from_another_and_lead_from_one_to_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (Placement.of_slots(torch.randperm(16, generator=generator)) for _ in range(2))
    assert torch.equal(one.after(one.moves_to(other)).slot_E, other.slot_E)
    assert Placement.identity(4).moves_to(Placement.identity(4).swapped(1, 3)) == "1>3 3>1"
    assert one.moves_to(one) == ""


def test_moves_of_copies_are_told_slot_by_slot() -> None:
    one = Placement.identity(4)
    copies = Placement(torch.tensor([0, 1, 3, 2, 1, 0]), torch.tensor([[0, 1, 3, 2], [5, 4, 3, 2]]))
    assert one.moves_to(copies) == "2<3 3<2 4<1 5<0"
    assert copies.moves_to(one) == "2<2 3<3"
    assert copies.changed_slots(copies) == [] and copies.key != one.key
    assert copies.slots_of(torch.tensor([[0, 1], [0, 2]]), torch.tensor([0, 1])).tolist() == [[0, 1], [5, 3]]
    with pytest.raises(ValueError, match="4 experts have 6 slots"):
        copies.after("0<1")


@given(ranks=st.integers(1, 6), tokens=st.integers(0, 12), seed=st.integers(0, 10**6))
@examples(60)
def test_quotas_equal_to_the_counts_are_handed_out_exactly_copy_by_copy(ranks: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts, slots = 5, 9
    source_N = torch.randint(ranks, (tokens,), generator=generator).sort().values
    ids_NK = torch.rand(tokens, experts, generator=generator).topk(3, dim=1).indices
    copies = random_copies(experts, slots, ranks, generator)
    quota_GS = torch.zeros(ranks, slots, dtype=torch.int64)
    for source, row in zip(source_N.tolist(), ids_NK.tolist(), strict=True):
        for expert in row:
            mine = (copies.expert_at_S == expert).nonzero().view(-1)
            quota_GS[source, mine[torch.randint(len(mine), (1,), generator=generator)]] += 1
    placement = Placement(copies.expert_at_S, copies.copy_GE, quota_GS)
    slot_NK = placement.slots_of(ids_NK, source_N)
    used = torch.bincount((source_N[:, None] * slots + slot_NK).view(-1), minlength=ranks * slots)
    assert torch.equal(used.view(ranks, slots), quota_GS)
    for source in range(ranks):
        for expert in range(experts):
            in_order = slot_NK[source_N == source][ids_NK[source_N == source] == expert].tolist()
            assert in_order == sorted(in_order)


@given(ranks=st.integers(1, 5), most=st.sampled_from([1, 3, 50]), seed=st.integers(0, 10**6))
@examples(60)
def test_one_rank_alone_chooses_as_all_together_and_in_proportion(ranks: int, most: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    source_N = torch.arange(ranks).repeat_interleave(7)
    ids_NK = torch.rand(len(source_N), 6, generator=generator).topk(2, dim=1).indices
    placement = with_quotas(random_copies(6, 11, ranks, generator), most, generator)
    slot_NK = placement.slots_of(ids_NK, source_N)
    tokens = [(source, tuple(row)) for source, row in zip(source_N.tolist(), ids_NK.tolist(), strict=True)]
    assert [tuple(row) for row in slot_NK.tolist()] == [slots for _, slots in with_slots(placement, tokens)]
    assert placement.shares is not None
    for source in range(ranks):
        with_none = torch.cat([ids_NK[source_N == source], torch.tensor([[-1, -1]])])
        shares = placement.shares.of_source(source, 6, torch.device("cpu"))
        alone = shares.slots_of(with_none.masked_fill(with_none < 0, 6).view(-1)).view(-1, 2)
        assert alone.tolist() == [*slot_NK[source_N == source].tolist(), [11, 11]]


def test_quotas_enter_the_key_and_must_fit() -> None:
    expert_at_S, copy_GE = torch.tensor([0, 1, 0]), torch.tensor([[0, 1], [2, 1]])
    quota_GS = torch.tensor([[3, 0, 1], [0, 0, 0]])
    one, other = Placement(expert_at_S, copy_GE, quota_GS), Placement(expert_at_S, copy_GE, quota_GS.flip(0))
    assert len({one.key, other.key, Placement(expert_at_S, copy_GE).key}) == 3
    source_N = torch.tensor([0, 0, 0, 0, 1])
    assert one.slots_of(torch.zeros(5, 1, dtype=torch.int64), source_N).view(-1).tolist() == [0, 0, 0, 2, 2]
    two = one.slots_of(torch.zeros(2, 1, dtype=torch.int64), source_N[:2])  # places 1/2 * 4 / 2 and 3/2 * 4 / 2
    assert two.view(-1).tolist() == [0, 2]
    for bad in (quota_GS[:1], quota_GS - 1, quota_GS.float()):
        with pytest.raises(ValueError, match=r"quota_GS is not int64 \[2, 3\], at least 0"):
            Placement(expert_at_S, copy_GE, bad)
    with pytest.raises(ValueError, match="beside a copy_GE"):
        Placement(torch.tensor([0, 1]), None, torch.zeros(2, 2, dtype=torch.int64))
