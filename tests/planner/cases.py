"""Random small worlds for the planner's tests, and settings that give every run the same ones."""

from dataclasses import dataclass, replace
from math import prod

import torch
from hypothesis import settings
from hypothesis import strategies as st

from hiermoe.policies.swap import SwapStatistics, measure_swaps
from hiermoe.routing.step import RoutingStep, make_step
from hiermoe.topology.cluster import Cluster, Level
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import AlphaBeta
from hiermoe.topology.placement import Placement


@dataclass(frozen=True)
class Case:
    """A hierarchy, a placement and one step of routing."""

    hierarchy: Hierarchy
    placement: Placement
    step: RoutingStep


def examples(number: int) -> settings:
    """That many examples, the same ones every time."""
    return settings(max_examples=number, derandomize=True, deadline=None)


@st.composite
def hierarchies(draw: st.DrawFn, depths: tuple[int, int] = (2, 4), most_ranks: int = 24) -> Hierarchy:
    """Levels that split each group in 2 to 4; the outermost may be a single group."""
    depth = draw(st.integers(*depths))
    factors: list[int] = []
    for level in range(depth):
        room = most_ranks // (prod(factors) * 2 ** (depth - level - 1))
        factors.append(draw(st.integers(1 if level == 0 and depth > 1 else 2, min(4, room))))
    return Hierarchy(tuple(prod(factors[: i + 1]) for i in range(depth)))


@st.composite
def cases(
    draw: st.DrawFn,
    depths: tuple[int, int] = (2, 4),
    most_ranks: int = 24,
    most_per_rank: int = 3,
    most_tokens: int = 6,
) -> Case:
    """Any placement, ragged token lists (ranks without tokens among them), routing from even to very skewed."""
    hierarchy = draw(hierarchies(depths, most_ranks))
    num_experts = hierarchy.num_ranks * draw(st.integers(1, most_per_rank))
    topk = draw(st.integers(1, min(8, num_experts)))
    tokens = draw(st.lists(st.integers(0, most_tokens), min_size=hierarchy.num_ranks, max_size=hierarchy.num_ranks))
    skew = draw(st.sampled_from([0.0, 1.0, 3.0]))
    seed = draw(st.integers(0, 2**16))
    shuffled = draw(st.booleans())
    generator = torch.Generator().manual_seed(seed)
    slot_E = torch.randperm(num_experts, generator=generator) if shuffled else torch.arange(num_experts)
    return Case(hierarchy, Placement.of_slots(slot_E), random_step(tokens, num_experts, topk, generator, skew))


@st.composite
def cases_with_copies(draw: st.DrawFn) -> Case:
    """Every expert at least once, slots left over for any of them, and any choice of copy by sources or tokens."""
    case = draw(cases(depths=(1, 4)))
    num_experts, ranks = case.step.num_experts, case.hierarchy.num_ranks
    slots = num_experts + ranks * draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    placement = random_copies(num_experts, slots, ranks, generator)
    if draw(st.booleans()):
        placement = with_quotas(placement, draw(st.sampled_from([1, 4, 100])), generator)
    if draw(st.booleans()):
        placement = replace(placement, gathered_in=case.hierarchy)
    return Case(case.hierarchy, placement, case.step)


def with_quotas(placement: Placement, most: int, generator: torch.Generator) -> Placement:
    """The placement with random quotas, half of them 0."""
    assert placement.copy_GE is not None
    quota_GS = torch.randint(-most, most + 1, (len(placement.copy_GE), placement.num_slots), generator=generator)
    return Placement(placement.expert_at_S, placement.copy_GE, quota_GS.clamp(min=0))


def random_copies(num_experts: int, num_slots: int, num_ranks: int, generator: torch.Generator) -> Placement:
    """Experts with copies anywhere; each GPU uses any copy of each expert."""
    spare = torch.randint(num_experts, (num_slots - num_experts,), generator=generator)
    expert_at_S = torch.cat([torch.arange(num_experts), spare])[torch.randperm(num_slots, generator=generator)]
    score_GES = torch.rand(num_ranks, num_experts, num_slots, generator=generator)
    is_copy_ES = expert_at_S == torch.arange(num_experts)[:, None]
    return Placement(expert_at_S, score_GES.masked_fill(~is_copy_ES, -1).argmax(-1))


def random_step(
    tokens: list[int], num_experts: int, topk: int, generator: torch.Generator, skew: float = 0.0
) -> RoutingStep:
    """K distinct experts for every token, by falling score; ``skew`` is the spread of the experts' popularity."""
    popularity = skew * torch.randn(num_experts, generator=generator)
    uniform = torch.rand(len(tokens), max(1, *tokens), num_experts, generator=generator).clamp(1e-9, 1 - 1e-7)
    gumbel = -(-uniform.log()).log()
    ids = (popularity + gumbel).topk(topk, dim=-1).indices
    return make_step(ids, torch.tensor(tokens), num_experts)


def random_cluster(hierarchy: Hierarchy, seed: int) -> Cluster:
    """Constants without any order among them, so that no stage may stand in for another."""
    generator = torch.Generator().manual_seed(seed)

    def constants() -> AlphaBeta:
        alpha, beta = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        return AlphaBeta(alpha_ms=alpha, beta_ms_per_byte=1e-4 * (0.01 + beta), source="random")

    last = hierarchy.depth
    levels = tuple(
        Level(
            name=f"level{i}", groups=hierarchy.U[i], link_gb_per_s=1.0 + i,
            inter=constants() if i < last else None, intra=constants() if i < last else None,
        )
        for i in range(1, last + 1)
    )  # fmt: skip
    return Cluster(name="random", description="", world=constants(), levels=levels)


def statistics(expert_ids_NK: torch.Tensor, placement: Placement, hierarchy: Hierarchy) -> SwapStatistics:
    """What HierD-ES decides from."""
    return SwapStatistics.unpack(measure_swaps(expert_ids_NK, placement, hierarchy), placement.num_experts, hierarchy)
