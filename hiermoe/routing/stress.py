"""Stress routing: loads built to hurt, each with what it may be used to claim.

Modelled on the imbalance benchmark of Megatron-LM's MoE layer: a workload is a function of (name, seed, iteration), and
every mode says which statement its numbers support. One mechanism, ``Stress``, makes all modes but one: a cycle of
per-expert weights and a cycle of token counts per rank. Which expert sits on which GPU means the placement that a run
starts with, expert e on GPU e // (E / G).
"""

from dataclasses import dataclass
from math import gcd, lcm

import numpy as np
import torch
from torch import Tensor

from hiermoe.routing.step import RoutingRequest, RoutingStep, experts_per_rank
from hiermoe.routing.synthetic import Endless, generator, weighted_choices


@dataclass(frozen=True, eq=False)
class Stress(Endless):
    """Experts drawn in proportion to weights that repeat in a cycle, from token counts that repeat in a cycle.

    Attributes:
        mode: its name; with seed and iteration it fixes every draw.
        weights_CE: float32 [C, E], at least 0, weights of iteration i in row i % C.
        num_tokens_CG: int64 [C', G], at most T, tokens per rank of iteration i in row i % C'.

    Raises:
        ValueError: fewer than K experts of an iteration have a weight.
    """

    mode: str
    weights_CE: Tensor
    num_tokens_CG: Tensor

    def __post_init__(self) -> None:
        loaded = int((self.weights_CE > 0).sum(1).min())
        if loaded < self.request.topk:
            raise ValueError(f"{self.mode}: {loaded} experts may get load, fewer than topk={self.request.topk}")

    def step(self, iteration: int) -> RoutingStep:
        """Routing of one iteration."""
        r = self.request
        rng = generator(self.mode, r.seed, iteration)
        weights_E = self.weights_CE[iteration % len(self.weights_CE)]
        num_tokens_G = self.num_tokens_CG[iteration % len(self.num_tokens_CG)]
        source_N = torch.arange(r.num_ranks).repeat_interleave(num_tokens_G)
        ids_NK = weighted_choices(rng, weights_E, len(source_N), r.topk)
        return RoutingStep(ids_NK, source_N, r.num_ranks, r.num_experts)


@dataclass(frozen=True)
class Balanced(Endless):
    """Every expert exactly equally loaded where N * K is divisible by E, else to within one token.

    Token n takes the next K of a shuffled list of all experts, walked round and round; the list is shuffled anew
    whenever a token ends where the list does. A fixed list (or a fixed stride) would balance just as well, but the same
    experts would fire together for ever, and a swap policy would gain from that.

    May claim: the cost of a system where neither load nor co-activation gives a placement anything to gain. A placement
    policy that wins here wins by chance, one that loses shows its own price.
    """

    family = "stress_balanced"

    def choices(self, rng: np.random.Generator) -> Tensor:
        """Experts of all tokens of a step: int64 [N, K]."""
        r = self.request
        pairs = self.num_tokens * r.topk
        period = lcm(r.num_experts, r.topk)  # pairs after which a token and the list end together
        lists = np.tile(np.arange(r.num_experts), (-(-pairs // period), 1))
        shuffled = torch.from_numpy(rng.permuted(lists, axis=1))
        return shuffled.repeat(1, period // r.num_experts).view(-1)[:pairs].view(-1, r.topk)


def hot_adjacent(request: RoutingRequest, num_hot: int, heat: float) -> Stress:
    """The first ``num_hot`` experts, side by side and so on the fewest GPUs, are ``heat`` times as popular as others.

    May claim: what a bad placement costs, and how much of it a policy wins back; ``hot_spread`` with the same
    parameters is the same demand placed well. Not: that such a load occurs.
    """
    return Stress(request, "stress_hot_adjacent", _hot(request, num_hot, heat), _full(request))


def hot_spread(request: RoutingRequest, num_hot: int, heat: float) -> Stress:
    """``num_hot`` experts at equal distances, and so on as many GPUs as possible, are ``heat`` times as popular.

    May claim: what skew costs that no swap can remove; a policy should find little to do here. Read it beside
    ``hot_adjacent``.
    """
    return Stress(request, "stress_hot_spread", _hot(request, num_hot, heat, spread=True), _full(request))


def hot_rank(request: RoutingRequest, heat: float) -> Stress:
    """All experts of GPU 0 are ``heat`` times as popular as others: nearly every token goes there, for several of them.

    May claim: the gain of deduplication and of swaps where one GPU is the bottleneck, an upper end for both. Not: an
    average gain.
    """
    per_rank = experts_per_rank(request.num_experts, request.num_ranks)
    return Stress(request, "stress_hot_rank", _hot(request, per_rank, heat), _full(request))


def ragged(request: RoutingRequest) -> Stress:
    """Uneven token counts, uniform experts. Three iterations in turn: 0..T rising over the ranks, all on one, falling.

    In the first and third, one rank holds no token and one holds T; in the second the middle rank holds every token
    of the step.

    May claim: that a system is correct and its prices hold for uneven senders. Its times compare systems, never other
    routings: a step has fewer than G * T tokens.
    """
    rising_G = torch.arange(request.num_ranks) * request.tokens_per_rank // max(request.num_ranks - 1, 1)
    lone_G = torch.zeros_like(rising_G)
    lone_G[request.num_ranks // 2] = request.tokens_per_rank
    num_tokens_CG = torch.stack([rising_G, lone_G, rising_G.flip(0)])
    return Stress(request, "stress_ragged", torch.ones(1, request.num_experts), num_tokens_CG)


def empty(request: RoutingRequest, idle_share: float) -> Stress:
    """Experts and GPUs without load: none for the last GPUs, nor for the first expert of each other one.

    ``idle_share`` of the GPUs, rounded down, are idle: they send their tokens and receive none. Where a GPU has a
    single expert, no further expert is idle.

    May claim: that empty messages and experts without tokens are handled. Not: a speed-up.

    Raises:
        ValueError: idle_share outside [0, 1), or what is left cannot serve K experts per token.
    """
    if not 0 <= idle_share < 1:
        raise ValueError(f"idle_share={idle_share} is outside [0, 1)")
    per_rank = experts_per_rank(request.num_experts, request.num_ranks)
    weights_GL = torch.ones(request.num_ranks, per_rank)
    if per_rank > 1:
        weights_GL[:, 0] = 0
    weights_GL[request.num_ranks - int(idle_share * request.num_ranks) :] = 0
    return Stress(request, "stress_empty", weights_GL.view(1, -1), _full(request))


def rotating(request: RoutingRequest, num_hot: int, heat: float, every: int) -> Stress:
    """A hot spot of ``num_hot`` neighbouring experts that moves on to the next ones after ``every`` iterations.

    May claim: how fast a policy follows. A swap acts one step after it was chosen, so with ``every`` = 1 it always
    comes too late and anything it gains is chance.

    Raises:
        ValueError: ``every`` below 1.
    """
    if every < 1:
        raise ValueError(f"every={every} must be at least 1")
    hot_E = _hot(request, num_hot, heat)[0]
    stops = request.num_experts // gcd(request.num_experts, num_hot)
    weights_CE = torch.stack([hot_E.roll(stop * num_hot) for stop in range(stops)]).repeat_interleave(every, dim=0)
    return Stress(request, "stress_rotating", weights_CE, _full(request))


def burst(request: RoutingRequest, num_hot: int, heat: float, period: int, length: int) -> Stress:
    """Uniform routing, but in the last ``length`` of every ``period`` iterations the first experts are hot.

    May claim: whether a policy over-reacts: what it gains in a burst against what its swaps cost after it.

    Raises:
        ValueError: ``length`` outside 1..period - 1.
    """
    if not 1 <= length < period:
        raise ValueError(f"length={length} is outside 1..{period - 1}, below period={period}")
    hot_E = _hot(request, num_hot, heat)[0]
    weights_CE = torch.ones(period, request.num_experts)
    weights_CE[period - length :] = hot_E
    return Stress(request, "stress_burst", weights_CE, _full(request))


def _hot(request: RoutingRequest, num_hot: int, heat: float, spread: bool = False) -> Tensor:
    """Weight ``heat`` for the first ``num_hot`` experts, or for as many at equal distances, 1 for others.

    Returns:
        float32 [1, E].

    Raises:
        ValueError: num_hot outside 1..E, or heat below 1.
    """
    if not 1 <= num_hot <= request.num_experts:
        raise ValueError(f"num_hot={num_hot} is outside 1..num_experts={request.num_experts}")
    if heat < 1:
        raise ValueError(f"heat={heat} must be at least 1")
    hot = torch.arange(num_hot)
    weights_E = torch.ones(request.num_experts)
    weights_E[hot * request.num_experts // num_hot if spread else hot] = heat
    return weights_E[None]


def _full(request: RoutingRequest) -> Tensor:
    """T tokens on every rank: int64 [1, G]."""
    return torch.full((1, request.num_ranks), request.tokens_per_rank)
