"""Small worlds whose best placement is known."""

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from hiermoe.routing.step import experts_per_rank
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement


def planted(experts: int, groups: int, topk: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens whose experts all belong to one of some hidden equal groups.

    Returns:
        int64 [N, K], logical experts; int64 [E], hidden group of each.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden_E = torch.arange(experts)[torch.randperm(experts, generator=generator)] % groups
    members = torch.stack([(hidden_E == group).nonzero().flatten() for group in range(groups)])
    group_N = torch.randint(groups, (tokens,), generator=generator)
    chosen = torch.rand(tokens, experts // groups, generator=generator).argsort(dim=1)[:, :topk]
    return members[group_N].gather(1, chosen), hidden_E


def every_placement(experts: int, hierarchy: Hierarchy) -> Iterator[Placement]:
    """All ways to put experts on GPUs, slots of one GPU in order; E and G must be tiny."""
    per_rank = experts_per_rank(experts, hierarchy.num_ranks)

    def fill(left: frozenset[int], taken: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if not left:
            yield taken
            return
        for chosen in combinations(sorted(left), per_rank):
            yield from fill(left - set(chosen), (*taken, *chosen))

    for expert_at in fill(frozenset(range(experts)), ()):
        yield Placement(torch.tensor(expert_at))
