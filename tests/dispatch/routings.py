"""Routing of all ranks for every case that a dispatcher must survive, with data on which nothing rounds."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hiermoe.routing.step import RoutingStep
from hiermoe.topology.placement import Placement

WIDTH = 8
NOT_CHOSEN = -7.0  # routing weight of experts that a token does not go to: no result may contain it


@dataclass(frozen=True, eq=False)
class Routing:
    """What the tokens of all ranks chose.

    Attributes:
        ids: for each rank int64 [T, K], experts by falling weight.
        weights: for each rank int64 [T, K], falling, all different.
        num_experts: E.
    """

    ids: list[Tensor]
    weights: list[Tensor]
    num_experts: int

    @property
    def topk(self) -> int:
        return self.ids[0].shape[1]

    def chosen_TE(self, rank: int) -> Tensor:
        """Routing map, bool [T, E]."""
        empty = torch.zeros(len(self.ids[rank]), self.num_experts, dtype=torch.bool)
        return empty.scatter(1, self.ids[rank], True)

    def probs_TE(self, rank: int) -> Tensor:
        """Routing weights, fp32 [T, E]."""
        rest = torch.full((len(self.ids[rank]), self.num_experts), NOT_CHOSEN)
        return rest.scatter(1, self.ids[rank], self.weights[rank].float())

    @property
    def step(self) -> RoutingStep:
        """The same for the planner."""
        source = torch.arange(len(self.ids)).repeat_interleave(torch.tensor([len(ids) for ids in self.ids]))
        return RoutingStep(torch.cat(self.ids), source, len(self.ids), self.num_experts)


def choose(tokens: list[int], popularity_E: Tensor, topk: int, generator: torch.Generator) -> Routing:
    """K different experts a token by weighted drawing without replacement; weight 0: never."""
    num_experts = len(popularity_E)
    ids, weights = [], []
    for count in tokens:
        noise = torch.rand(count, num_experts, generator=generator).clamp(1e-6, 1 - 1e-6)
        ids.append((popularity_E.log() - (-noise.log()).log()).topk(topk, dim=1).indices)
        range_NK = torch.rand(count, topk + 4, generator=generator).topk(topk, dim=1).indices + 1
        weights.append(range_NK.sort(dim=1, descending=True).values)
    return Routing(ids, weights, num_experts)


def _even(ranks: int, generator: torch.Generator) -> Routing:
    return choose([6] * ranks, torch.ones(2 * ranks), 3, generator)


def _zipf(ranks: int, generator: torch.Generator) -> Routing:
    popularity = 1 / (1 + torch.randperm(2 * ranks, generator=generator).float()) ** 1.5
    return choose([8] * ranks, popularity, 4, generator)


def _one_hot_expert(ranks: int, generator: torch.Generator) -> Routing:
    popularity = torch.ones(2 * ranks)
    popularity[ranks + 1] = 1e12
    return choose([7] * ranks, popularity, 3, generator)


def _empty_experts(ranks: int, generator: torch.Generator) -> Routing:
    popularity = torch.ones(3 * ranks)
    popularity[::3] = 0
    return choose([5] * ranks, popularity, 3, generator)


def _rank_without_tokens(ranks: int, generator: torch.Generator) -> Routing:
    tokens = [5] * ranks
    tokens[1] = 0
    return choose(tokens, torch.ones(2 * ranks), 3, generator)


def _rank_that_receives_nothing(ranks: int, generator: torch.Generator) -> Routing:
    popularity = torch.ones(2 * ranks)
    popularity[4:6] = 0
    return choose([5] * ranks, popularity, 3, generator)


def _node_that_receives_nothing(ranks: int, generator: torch.Generator) -> Routing:
    popularity = torch.ones(2 * ranks)
    popularity[ranks:] = 0
    return choose([5] * ranks, popularity, 3, generator)


def _top_1(ranks: int, generator: torch.Generator) -> Routing:
    return choose([6] * ranks, torch.ones(2 * ranks), 1, generator)


def _top_1_all_to_one(ranks: int, generator: torch.Generator) -> Routing:
    popularity = torch.zeros(2 * ranks)
    popularity[-2] = 1
    return choose([4] * ranks, popularity, 1, generator)


def _all_experts(ranks: int, generator: torch.Generator) -> Routing:
    return choose([3] * ranks, torch.ones(2 * ranks), 2 * ranks, generator)


def _ragged(ranks: int, generator: torch.Generator) -> Routing:
    return choose([3 * rank % 7 + rank for rank in range(ranks)], torch.ones(2 * ranks), 3, generator)


def _one_expert_a_rank(ranks: int, generator: torch.Generator) -> Routing:
    return choose([5] * ranks, torch.ones(ranks), 2, generator)


def _no_tokens(ranks: int, generator: torch.Generator) -> Routing:
    return choose([0] * ranks, torch.ones(2 * ranks), 2, generator)


CASES: dict[str, Callable[[int, torch.Generator], Routing]] = {
    "even": _even,
    "zipf": _zipf,
    "one_hot_expert": _one_hot_expert,
    "empty_experts": _empty_experts,
    "rank_without_tokens": _rank_without_tokens,
    "rank_that_receives_nothing": _rank_that_receives_nothing,
    "node_that_receives_nothing": _node_that_receives_nothing,
    "top_1": _top_1,
    "top_1_all_to_one": _top_1_all_to_one,
    "all_experts": _all_experts,
    "ragged": _ragged,
    "one_expert_a_rank": _one_expert_a_rank,
    "no_tokens": _no_tokens,
}
PLACED = ("zipf", "ragged", "all_experts", "rank_without_tokens", "one_expert_a_rank")  # run also with moved experts
FEWER = (
    "zipf",
    "one_hot_expert",
    "rank_without_tokens",
    "all_experts",
    "ragged",
    "one_expert_a_rank",
)  # for more worlds


@cache
def routing_of(case: str, ranks: int) -> Routing:
    """The case's routing, the same in every process."""
    return CASES[case](ranks, torch.Generator().manual_seed(list(CASES).index(case) + 100 * ranks))


def placement_of(case: str, num_experts: int) -> Placement:
    """A placement that moves most experts."""
    generator = torch.Generator().manual_seed(list(CASES).index(case))
    return Placement.of_slots(torch.randperm(num_experts, generator=generator))


@dataclass(frozen=True)
class Numbers:
    """Small integers as inputs of a layer of linear experts, so that no sum or product rounds in fp32.

    Attributes:
        x: for each rank [T, M].
        gradient: for each rank [T, M], of the output.
        weight_EMM: of every logical expert.
    """

    x: list[Tensor]
    gradient: list[Tensor]
    weight_EMM: Tensor


@cache
def numbers_for(routing: Routing) -> Numbers:
    """The same in every process."""
    generator = torch.Generator().manual_seed(5)

    def integers(most: int, *shape: int) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=generator).float()

    return Numbers(
        [integers(3, len(ids), WIDTH) for ids in routing.ids],
        [integers(3, len(ids), WIDTH) for ids in routing.ids],
        integers(2, routing.num_experts, WIDTH, WIDTH),
    )


@dataclass(frozen=True)
class Answer:
    """What a layer gives: for each rank, and for each logical expert."""

    output: list[Tensor]
    x_gradient: list[Tensor]
    probs_gradient: list[Tensor]
    weight_gradient_EMM: Tensor


def exact_answer(routing: Routing, numbers: Numbers, kept: list[Tensor] | None = None) -> Answer:
    """The layer in integers, over all experts at once: nothing is dispatched and nothing can round.

    Args:
        routing: what tokens chose.
        numbers: inputs.
        kept: for each rank bool [T, E], pairs that are not dropped; None for all.
    """
    weight_EMM = numbers.weight_EMM.long()
    output, x_gradient, probs_gradient = [], [], []
    weight_gradient = torch.zeros_like(weight_EMM)
    for rank in range(len(routing.ids)):
        chosen = routing.chosen_TE(rank) if kept is None else kept[rank]
        x, g = numbers.x[rank].long(), numbers.gradient[rank].long()
        probs = routing.probs_TE(rank).long() * chosen
        expert_output = torch.einsum("tm,enm->ten", x, weight_EMM)
        output.append(torch.einsum("te,ten->tn", probs, expert_output))
        x_gradient.append(torch.einsum("te,enm,tn->tm", probs, weight_EMM, g))
        probs_gradient.append(torch.einsum("ten,tn->te", expert_output, g) * chosen)
        weight_gradient += torch.einsum("te,tn,tm->enm", probs, g, x)
    return Answer(output, x_gradient, probs_gradient, weight_gradient)


def kept_pairs(routing: Routing, capacity_factor: float) -> list[Tensor]:
    """What Tutel's capacity leaves, pair by pair: all first choices before any second one, then by token."""
    most = max(len(ids) for ids in routing.ids)
    capacity = routing.topk * int(capacity_factor * math.ceil(most / routing.num_experts))
    kept = []
    for ids in routing.ids:
        mine = torch.zeros(len(ids), routing.num_experts, dtype=torch.bool)
        filled: Counter[int] = Counter()
        for choice in range(routing.topk):
            for token, experts in enumerate(ids.tolist()):
                if filled[experts[choice]] < capacity:
                    filled[experts[choice]] += 1
                    mine[token, experts[choice]] = True
        kept.append(mine)
    return kept
