"""Random counts of a micro-batch for planners, and what their placements do with them, as plain numbers."""

from collections import Counter

import torch

from hiermoe.model import RowBytes
from hiermoe.planner.scheme import hierarchical
from hiermoe.policies.protocol import StepContext
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.planner.cases import random_cluster

Shares = dict[tuple[int, int, int], int]  # source, expert, GPU -> tokens; none that are 0


def context(hierarchy: Hierarchy, iteration: int = 0) -> StepContext:
    scheme = hierarchical(1, False, hierarchy)
    return StepContext(iteration, random_cluster(hierarchy, 0), scheme, RowBytes.alike(4096), 10**6)


def random_pairs(ranks: int, experts: int, most: int, seed: int, skew: float = 2.0) -> torch.Tensor:
    """Counts of any size, some experts and some sources without tokens: int64 [G, E]."""
    generator = torch.Generator().manual_seed(seed)
    popular_E = (skew * torch.randn(experts, generator=generator)).exp() * (
        torch.rand(experts, generator=generator) < 0.9
    )
    held_G = torch.rand(ranks, generator=generator) < 0.9
    pairs_GE = torch.rand(ranks, experts, generator=generator) * popular_E * held_G[:, None]
    return (pairs_GE * most / pairs_GE.max().clamp(min=1e-9)).round().long()


def random_home(ranks: int, per_rank: int, seed: int) -> Placement:
    return Placement.of_slots(torch.randperm(ranks * per_rank, generator=torch.Generator().manual_seed(seed)))


def routed_pairs(ranks: int, experts: int, tokens: int, topk: int, skew: float, seed: int = 0) -> torch.Tensor:
    """Counts of tokens that draw K different experts each: int64 [G, E]."""
    generator = torch.Generator().manual_seed(seed)
    popularity = skew * torch.randn(experts, generator=generator)
    pairs = []
    for _ in range(ranks):
        uniform = torch.rand(tokens, experts, generator=generator).clamp(1e-9, 1 - 1e-7)
        chosen = (popularity - (-uniform.log()).log()).topk(topk, dim=1).indices
        pairs.append(torch.bincount(chosen.view(-1), minlength=experts))
    return torch.stack(pairs)


def at_home(pairs_GE: torch.Tensor, home: Placement) -> Shares:
    rank_E = home.rank_of(len(pairs_GE)).tolist()
    return {
        (source, expert, rank_E[expert]): tokens
        for source, row in enumerate(pairs_GE.tolist())
        for expert, tokens in enumerate(row)
        if tokens
    }


def shares(placement: Placement | None, pairs_GE: torch.Tensor, home: Placement) -> Shares:
    """What a planner made of the counts."""
    if placement is None:
        return at_home(pairs_GE, home)
    assert placement.quota_GS is not None
    found: Counter[tuple[int, int, int]] = Counter()
    per_rank = placement.num_slots // len(pairs_GE)
    expert_at = placement.expert_at_S.tolist()
    for source, row in enumerate(placement.quota_GS.tolist()):
        for slot, tokens in enumerate(row):
            found[source, expert_at[slot], slot // per_rank] += tokens
    return {key: tokens for key, tokens in found.items() if tokens}


def loads(found: Shares, ranks: int) -> list[int]:
    """Tokens of every GPU."""
    total = [0] * ranks
    for (_, _, rank), tokens in found.items():
        total[rank] += tokens
    return total


def imbalance(found: Shares, ranks: int) -> float:
    total = loads(found, ranks)
    return max(total) * ranks / sum(total)


def guests(found: Shares, home: Placement, ranks: int) -> dict[int, set[int]]:
    """Experts that a GPU computes and that are not at home there."""
    rank_E = home.rank_of(ranks).tolist()
    here: dict[int, set[int]] = {rank: set() for rank in range(ranks)}
    for _, expert, rank in found:
        if rank_E[expert] != rank:
            here[rank].add(expert)
    return here


def in_ranges(pairs_GE: torch.Tensor, amounts: list[dict[int, int]]) -> Shares:
    """Every expert's tokens as a list by source, the first ones to the lowest GPU, and so on."""
    found: Counter[tuple[int, int, int]] = Counter()
    for expert, mine in enumerate(amounts):
        sources = [source for source, n in enumerate(pairs_GE[:, expert].tolist()) for _ in range(n)]
        targets = [rank for rank in sorted(mine) for _ in range(mine[rank])]
        for source, target in zip(sources, targets, strict=True):
            found[source, expert, target] += 1
    return dict(found)
