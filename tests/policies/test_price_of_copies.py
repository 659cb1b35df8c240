"""What copies of experts cost in a step, against transfers that are listed one by one."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiermoe.model import LayerSizes
from hiermoe.policies.price_of_copies import price_copies
from hiermoe.policies.price_of_moving import price_migration, price_transfers
from hiermoe.policies.protocol import CopyTerms
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.planner.cases import examples, hierarchies, random_cluster, random_copies

SIZES = LayerSizes(num_experts=8, topk=2, hidden_size=4, element_bytes=2, expert_parameters=1000, num_layers=10)
ONCE, TWICE = CopyTerms(shared_buffers=False, gradient_bytes=2), CopyTerms(shared_buffers=True, gradient_bytes=4)
HOME = Placement.identity(8)


def with_copies_of_0(*gpus: int) -> Placement:
    """Two experts and one more slot on each of 4 GPUs; expert 0 copied to these, the other slots hold no guest."""
    at = [e for gpu in range(4) for e in (2 * gpu, 2 * gpu + 1, 0 if gpu in gpus else 2 * gpu)]
    copy_GE = torch.tensor([[3 * (e // 2) + e % 2 for e in range(8)]] * 4)
    return Placement(torch.tensor(at), copy_GE)


@given(hierarchy=hierarchies(), terms=st.sampled_from([ONCE, TWICE]), seed=st.integers(0, 10**6))
@examples(40)
def test_each_gpu_that_has_a_guest_gets_it_from_home_and_sends_its_gradient_back(
    hierarchy: Hierarchy, terms: CopyTerms, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ranks, cluster = hierarchy.num_ranks, random_cluster(hierarchy, seed)
    home = Placement.of_slots(torch.randperm(2 * ranks, generator=generator))
    placement = random_copies(2 * ranks, 3 * ranks, ranks, generator)
    sizes = replace(SIZES, num_experts=2 * ranks)
    cost = price_copies(placement, home, cluster, terms, sizes)
    guests = sorted({(e, slot // 3) for slot, e in enumerate(placement.expert_at_S.tolist())})
    sent = [(int(home.slot_E[e]) // 2, gpu) for e, gpu in guests if int(home.slot_E[e]) // 2 != gpu]
    ends = [torch.tensor(end, dtype=torch.int64) for end in zip(*sent, strict=True)] or [torch.empty(0).long()] * 2
    weight_bytes = 2 * 1000 * (2 if terms.shared_buffers else 1)
    assert cost.weights == price_transfers(ends[0], ends[1], cluster, weight_bytes)
    assert cost.weights.moved_bytes == weight_bytes * len(sent)
    assert cost.gradients == price_transfers(ends[1], ends[0], cluster, terms.gradient_bytes * 1000)
    of_one_slot = (2 + terms.gradient_bytes) * 1000
    assert cost.slots_gb == pytest.approx(of_one_slot * (1 if terms.shared_buffers else 10) / 1e9)


def test_weights_are_priced_as_a_migration_of_bf16_weights(a6000: Cluster) -> None:
    home, sizes = Placement.identity(128), replace(SIZES, num_experts=128)
    placement = random_copies(128, 160, 32, torch.Generator().manual_seed(0))
    assert price_copies(placement, home, a6000, ONCE, sizes).weights == price_migration(home, placement, a6000, 2000)


def test_slots_that_hold_no_guest_cost_memory_only() -> None:
    cost = price_copies(with_copies_of_0(), HOME, random_cluster(Hierarchy((2, 4)), 0), ONCE, SIZES)
    assert cost.weights.moved_bytes == cost.gradients.moved_bytes == 0
    assert cost.weights.link_ms == 0 and cost.slots_gb == pytest.approx(10 * 4 * 1000 / 1e9)
    unknown = replace(SIZES, num_layers=None)
    assert math.isnan(price_copies(HOME, HOME, random_cluster(Hierarchy((2, 4)), 0), ONCE, unknown).slots_gb)


def test_copies_pass_an_expert_on_where_there_are_enough_and_enter_a_node_once() -> None:
    cluster, everywhere = random_cluster(Hierarchy((2, 4)), 1), with_copies_of_0(1, 2, 3)
    slow = cluster.levels[0].link_gb_per_s * 1e6
    direct = price_copies(everywhere, HOME, cluster, ONCE, SIZES)
    relayed = price_copies(everywhere, HOME, cluster, replace(ONCE, relays_from=3), SIZES)
    few = price_copies(everywhere, HOME, cluster, replace(ONCE, relays_from=4), SIZES)
    assert direct == few and direct.weights.moved_bytes == relayed.weights.moved_bytes == 6000
    assert direct.weights == price_transfers(torch.tensor([0, 0, 0]), torch.tensor([1, 2, 3]), cluster, 2000)
    assert relayed.weights == price_transfers(torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3]), cluster, 2000)
    assert direct.weights.link_ms >= 2 * 2000 / slow


def test_of_an_expert_with_copies_at_home_the_lowest_slot_is_home() -> None:
    cluster, placement = random_cluster(Hierarchy((2, 4)), 2), with_copies_of_0(2)
    cost = price_copies(placement, placement, cluster, ONCE, SIZES)
    assert cost.weights == price_transfers(torch.tensor([0]), torch.tensor([2]), cluster, 2000)


def test_sharded_experts_come_from_everybody_for_every_slot() -> None:
    cluster = random_cluster(Hierarchy((2, 4)), 3)
    cost = price_copies(with_copies_of_0(2), HOME, cluster, replace(TWICE, sharded=True), SIZES)
    assert cost.weights.moved_bytes == 12 * 2 * 2 * 750  # 12 pairs of GPUs, two sends, a quarter of 3 slots
    assert cost.gradients.moved_bytes == 12 * 4 * 750
    assert cost.slots_gb == pytest.approx(3 * 6 * 1000 / 1e9)


def test_copies_with_training_state_get_summed_gradients_and_take_more_memory() -> None:
    cluster, terms = random_cluster(Hierarchy((2, 4)), 4), CopyTerms(False, 4, with_state=True)
    cost = price_copies(with_copies_of_0(2), HOME, cluster, terms, SIZES)
    assert cost.weights == price_transfers(torch.tensor([0]), torch.tensor([2]), cluster, 4000)
    assert cost.gradients == price_transfers(torch.tensor([2]), torch.tensor([0]), cluster, 4000)
    assert cost.slots_gb == pytest.approx(10 * (14 + 4) * 1000 / 1e9)


def test_gradients_of_a_parameter_take_two_or_four_bytes() -> None:
    with pytest.raises(ValueError, match="gradient_bytes=3 must be 2 or 4"):
        CopyTerms(shared_buffers=False, gradient_bytes=3)
