"""Partitions as placements."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from hiermoe.planner.token_sets import TokenSets
from hiermoe.policies.search import seeds
from hiermoe.policies.search.seeds import SeedKind, even, partition_experts
from hiermoe.topology.hierarchy import Hierarchy
from tests.policies.search.conftest import planted

KINDS: list[SeedKind] = ["pairs", "sets"]
HIERARCHY = Hierarchy((4, 8, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_fire_together_come_to_one_group(kind: SeedKind) -> None:
    ids_NK, hidden_E = planted(64, 4, 6, 3000, seed=1)
    placement = partition_experts(TokenSets.of(ids_NK, 64).merged(), HIERARCHY, kind, seed=0)
    node_E = placement.slot_E // 16
    assert all(len(set(hidden_E[node_E == node].tolist())) == 1 for node in range(4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_partition_is_the_same_every_time(kind: SeedKind) -> None:
    ids_NK = torch.rand(2000, 64, generator=torch.Generator().manual_seed(3)).argsort(dim=1)[:, :4]
    sets = TokenSets.of(ids_NK, 64)
    first = partition_experts(sets, HIERARCHY, kind, seed=5)
    seeds._partitioned.cache_clear()
    assert torch.equal(first.slot_E, partition_experts(sets, HIERARCHY, kind, seed=5).slot_E)


def test_equal_sets_are_partitioned_once_and_others_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    ids_NK = torch.rand(500, 16, generator=torch.Generator().manual_seed(3)).argsort(dim=1)[:, :4]
    blocks: list[int] = []
    split = seeds._split
    monkeypatch.setattr(seeds, "_split", lambda block, *rest: blocks.append(len(block)) or split(block, *rest))
    seeds._partitioned.cache_clear()

    def first_cuts() -> int:
        return blocks.count(16)

    for _ in range(2):
        partition_experts(TokenSets.of(ids_NK.clone(), 16), Hierarchy((2, 4)), "pairs", seed=0)
    assert first_cuts() == 1
    sets = TokenSets.of(ids_NK, 16)
    heavier = replace(sets, weight_N=sets.weight_N * torch.arange(1, len(ids_NK) + 1, dtype=torch.int32))
    partition_experts(heavier, Hierarchy((2, 4)), "pairs", seed=0)
    partition_experts(sets, Hierarchy((2, 4, 8)), "pairs", seed=0)
    partition_experts(sets, Hierarchy((2, 4)), "sets", seed=0)
    assert first_cuts() == 4


@pytest.mark.parametrize("kind", KINDS)
def test_single_experts_and_experts_that_nobody_selects_are_placed_too(kind: SeedKind) -> None:
    sets = TokenSets.of(torch.tensor([[0, 5], [5, 9], [0, 9]] * 20), 16)
    for hierarchy in (Hierarchy((4, 16)), Hierarchy((2, 4, 8)), Hierarchy((1, 2))):
        placement = partition_experts(sets, hierarchy, kind, seed=0)
        assert sorted(placement.slot_E.tolist()) == list(range(16))


def test_repair_moves_the_fewest_and_the_least_bound() -> None:
    weight = np.zeros((6, 6), dtype=int)
    for a, b, together in ((0, 1, 9), (1, 2, 9), (0, 2, 9), (3, 4, 5), (3, 2, 1)):
        weight[a, b] = weight[b, a] = together
    repaired = even(np.array([0, 0, 0, 0, 1, 1]), 2, weight)
    assert repaired.tolist() == [0, 0, 0, 1, 1, 1]
    already = np.array([1, 0, 1, 0, 1, 0])
    assert even(already, 2, weight).tolist() == already.tolist()


def test_a_missing_partitioner_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mtkahypar", None)
    seeds._partitioner.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'mtkahypar>=1.7'"):
        partition_experts(TokenSets.of(torch.tensor([[0, 1]]), 8), Hierarchy((2, 4)), "pairs", 0)
