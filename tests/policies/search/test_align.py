"""The same placement under other names."""

from itertools import permutations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hiermoe.policies.search.align import aligned
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.planner.cases import examples

HIERARCHY = Hierarchy((2, 4, 8))


def renamings() -> list[torch.Tensor]:
    """New name of every GPU, for all ways to exchange groups within the groups above them: int64 [8] each."""
    found = []
    for nodes in permutations(range(2)):
        for halves in [(a, b) for a in permutations(range(2)) for b in permutations(range(2))]:
            for flips in range(16):
                names = []
                for gpu in range(8):
                    node, half, lane = gpu // 4, gpu // 2 % 2, gpu % 2
                    lane ^= flips >> (gpu // 2) & 1
                    names.append(nodes[node] * 4 + halves[node][half] * 2 + lane)
                found.append(torch.tensor(names))
    return found


@examples(25)
@given(seed=st.integers(0, 2**16), per_rank=st.integers(1, 3))
def test_fewest_experts_move_of_all_renamings(seed: int, per_rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    present, target = (Placement.of_slots(torch.randperm(8 * per_rank, generator=generator)) for _ in range(2))
    result = aligned(target, present, HIERARCHY)
    ranks = [names[target.rank_of(8)] for names in renamings()]
    least = min(int((rank_E != present.rank_of(8)).sum()) for rank_E in ranks)
    assert int((result.rank_of(8) != present.rank_of(8)).sum()) == least
    assert any(torch.equal(rank_E, result.rank_of(8)) for rank_E in ranks)


def test_a_renamed_placement_is_recognised_and_nothing_moves() -> None:
    present = Placement.of_slots(torch.randperm(16, generator=torch.Generator().manual_seed(1)))
    for names in renamings():
        renamed = Placement.identity(16).on_ranks(names[present.rank_of(8)], 8)
        assert torch.equal(aligned(renamed, present, HIERARCHY).slot_E, present.slot_E)


def test_who_keeps_its_gpu_keeps_its_slot() -> None:
    present = Placement.identity(8)
    rank_E = torch.tensor([0, 1, 0, 1, 2, 3, 3, 2])  # 1 and 2 change places, 5 and 7
    assert present.on_ranks(rank_E, 4).slot_E.tolist() == [0, 2, 1, 3, 4, 7, 6, 5]
