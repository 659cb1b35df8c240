"""A placement is a permutation, and swaps keep it one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiermoe.topology.placement import Placement

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
