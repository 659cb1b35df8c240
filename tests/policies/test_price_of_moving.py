"""What moving experts costs on the paper's testbed."""

import math
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiermoe.policies.price_of_moving import STATE_BYTES_PER_PARAMETER, WEIGHT_BYTES_PER_PARAMETER, price_migration
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.placement import Placement
from tests.planner.cases import Case, cases, examples, random_cluster

QWEN3_EXPERT = 3 * 2048 * 768  # parameters of one expert: gate, up and down projection
HERE = Placement.identity(128)  # 4 experts a GPU, 8 a pair, 16 a half, 32 a node


def test_one_qwen3_expert_across_nodes(a6000: Cluster) -> None:
    """Reading 7: about 66 MB, 2.6 ms over the bare link, 35 ms at the rate of an AlltoAll."""
    assert QWEN3_EXPERT == 4718592
    state_bytes = STATE_BYTES_PER_PARAMETER * QWEN3_EXPERT
    assert state_bytes == 66_060_288
    cost = price_migration(HERE, HERE.swapped(0, 127), a6000, state_bytes)
    assert (cost.moved_experts, cost.moved_bytes) == (2, 2 * state_bytes)  # there and back at the same time
    assert cost.link_ms == pytest.approx(2.6, abs=0.05)
    assert cost.alltoall_ms == pytest.approx(35, abs=0.1)
    weights = price_migration(HERE, HERE.swapped(0, 127), a6000, WEIGHT_BYTES_PER_PARAMETER * QWEN3_EXPERT)
    assert weights.link_ms == pytest.approx(cost.link_ms / 7)


@pytest.mark.parametrize(
    ("other", "link_gb_per_s", "beta_ms_per_byte"),
    [(4, 56.25, 1.64e-8), (8, 31.5, 2.06e-8), (16, 31.5, 1.17e-7), (32, 25.0, 5.29e-7)],
)
def test_nearer_experts_move_at_the_rate_of_their_level(
    a6000: Cluster, other: int, link_gb_per_s: float, beta_ms_per_byte: float
) -> None:
    cost = price_migration(HERE, HERE.swapped(0, other), a6000, 1_000_000)
    assert cost.link_ms == pytest.approx(1.0 / link_gb_per_s)
    assert cost.alltoall_ms == pytest.approx(1e6 * beta_ms_per_byte)


def test_moves_inside_a_gpu_are_free(a6000: Cluster) -> None:
    for after in (HERE, HERE.swapped(0, 3), HERE.swapped(5, 6).swapped(124, 127)):
        cost = price_migration(HERE, after, a6000, 66_060_288)
        assert (cost.moved_experts, cost.moved_bytes, cost.link_ms, cost.alltoall_ms) == (0, 0, 0.0, 0.0)


def test_moves_share_the_link_of_their_node(a6000: Cluster) -> None:
    """Experts 0 and 4 leave node 0 from two GPUs: one card, two ports."""
    both = price_migration(HERE, HERE.swapped(0, 32).swapped(4, 64), a6000, 1_000_000)
    assert both.link_ms == pytest.approx(2 / 25.0)
    assert both.alltoall_ms == pytest.approx(1e6 * 5.29e-7)
    one_gpu = price_migration(HERE, HERE.swapped(0, 32).swapped(1, 64), a6000, 1_000_000)
    assert one_gpu.link_ms == pytest.approx(2 / 25.0)
    assert one_gpu.alltoall_ms == pytest.approx(2e6 * 5.29e-7)
    apart = price_migration(HERE, HERE.swapped(0, 32).swapped(64, 96), a6000, 1_000_000)
    assert apart.link_ms == pytest.approx(1 / 25.0)


def test_a_cycle_costs_what_its_busiest_end_does(a6000: Cluster) -> None:
    """Receiving counts as sending does: three nodes pass one expert on."""
    slot_E = torch.arange(128)
    slot_E[[0, 32, 64]] = slot_E[[32, 64, 0]]
    cost = price_migration(HERE, Placement.of_slots(slot_E), a6000, 1_000_000)
    assert cost.moved_experts == 3
    assert cost.link_ms == pytest.approx(1 / 25.0)


def test_the_way_back_costs_the_same(a6000: Cluster) -> None:
    away = Placement.of_slots(torch.randperm(128, generator=torch.Generator().manual_seed(0)))
    assert price_migration(HERE, away, a6000, 1000) == price_migration(away, HERE, a6000, 1000)


def test_a_gpu_that_receives_from_afar_waits_for_all_of_it(a6000: Cluster) -> None:
    """GPU 0 gets an expert from node 1 and one from node 2, and passes two on to GPUs 1 and 2, which send theirs out.

    Nobody sends more than one expert far away, but GPU 0 receives two.
    """
    slot_E = torch.arange(128)
    slot_E[[0, 4, 32]] = slot_E[[4, 32, 0]]
    slot_E[[1, 8, 64]] = slot_E[[8, 64, 1]]
    cost = price_migration(HERE, Placement.of_slots(slot_E), a6000, 1_000_000)
    assert cost.alltoall_ms == pytest.approx(2e6 * 5.29e-7)


@given(case=cases(depths=(1, 5)), seed=st.integers(0, 1000))
@examples(40)
def test_costs_equal_a_count_of_every_move(case: Case, seed: int) -> None:
    """Links of any speed: inner ones may be the slow ones."""
    hierarchy, cluster = case.hierarchy, random_cluster(case.hierarchy, seed)
    generator = torch.Generator().manual_seed(seed)
    speeds = (1 + 30 * torch.rand(hierarchy.depth, generator=generator)).tolist()
    levels = tuple(
        level.model_copy(update={"link_gb_per_s": s}) for level, s in zip(cluster.levels, speeds, strict=True)
    )
    cluster = cluster.model_copy(update={"levels": levels})
    after = Placement.of_slots(torch.randperm(case.step.num_experts, generator=generator))
    old_E, new_E = case.placement.rank_of(hierarchy.num_ranks), after.rank_of(hierarchy.num_ranks)
    leaving: Counter[tuple[int, int]] = Counter()  # experts that leave a group, by (level, group)
    sending: dict[int, float] = defaultdict(float)
    receiving: dict[int, float] = defaultdict(float)
    for old, new in zip(old_E.tolist(), new_E.tolist(), strict=True):
        apart = [i for i in range(1, hierarchy.depth + 1) if old // hierarchy.lanes(i) != new // hierarchy.lanes(i)]
        if not apart:
            continue
        for level in apart:
            leaving[level, old // hierarchy.lanes(level)] += 1
        if apart[0] < hierarchy.depth:
            constants = levels[apart[0] - 1].inter
        else:
            constants = levels[apart[0] - 2].intra if apart[0] > 1 else cluster.world
        assert constants is not None
        sending[old] += constants.beta_ms_per_byte
        receiving[new] += constants.beta_ms_per_byte
    cost = price_migration(case.placement, after, cluster, 5000)
    link_ms = max((n * 5000 / (speeds[level - 1] * 1e6) for (level, _), n in leaving.items()), default=0.0)
    busiest = max([*sending.values(), *receiving.values(), 0.0])
    assert cost.moved_experts == int((old_E != new_E).sum())
    assert math.isclose(cost.link_ms, link_ms, rel_tol=1e-12)
    assert math.isclose(cost.alltoall_ms, 5000 * busiest, rel_tol=1e-12)
