"""Synthetic routing: families of expert choices that derive from (name, seed, iteration) alone.

Every family is a ``RoutingSource`` without end. What is fixed over a run (which experts are popular) derives from
(name, seed), what a step draws from (name, seed, iteration), so any step can be made anew, alone, on any machine.
Only ``GroupLimited`` heeds the group limit of a request.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from hiermoe.records.status import NotApplicable
from hiermoe.routing.step import RoutingRequest, RoutingStep


def generator(name: str, seed: int, iteration: int | None = None) -> np.random.Generator:
    """Random numbers of one iteration, or, without an iteration, of what is fixed over the run.

    Raises:
        ValueError: seed or iteration is negative.
    """
    for key, value in (("seed", seed), ("iteration", iteration or 0)):
        if value < 0:
            raise ValueError(f"{key}={value} must be at least 0")
    # SeedSequence pads with zeros, so [name, seed] alone would be the stream of iteration 0.
    stream = 0 if iteration is None else 1 + iteration
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([crc32(name.encode()), seed, stream])))


def weighted_choices(rng: np.random.Generator, weights: Tensor, num_tokens: int, topk: int) -> Tensor:
    """Draw K distinct experts per token, one after the other, each in proportion to its weight among those left.

    The experts race: arrival times are exponential with the weights as rates, and the K first win.

    Args:
        rng: source of randomness.
        weights: float32 [E] or [N, E], at least 0, at least K of a token above 0. An expert of weight 0 is never drawn.
        num_tokens: N.
        topk: K.

    Returns:
        int64 [N, K], in the order of arrival.
    """
    shape = (num_tokens, weights.shape[-1])
    arrival_NE = torch.from_numpy(rng.standard_exponential(shape, dtype=np.float32)).div_(weights)
    return arrival_NE.topk(topk, dim=1, largest=False).indices


def uniform_choices(rng: np.random.Generator, num_experts: int, num_tokens: int, topk: int) -> Tensor:
    """Draw K distinct experts per token, every ordered choice equally likely.

    The i-th draw is a position among the E - i experts left. Walking through the chosen ones in rising order turns it
    into an expert: O(K^2) vector operations of length N instead of E random numbers and a top-k per token.

    Returns:
        int64 [N, K].
    """
    dtype = np.int16 if num_experts <= np.iinfo(np.int16).max else np.int64
    chosen: list[np.ndarray] = []
    rising: list[np.ndarray] = []  # the same experts, each token's in rising order
    for i in range(topk):
        expert_N = rng.integers(0, num_experts - i, num_tokens, dtype=dtype)
        for smaller_N in rising:
            expert_N += expert_N >= smaller_N
        chosen.append(expert_N)
        for j, other_N in enumerate(rising):
            rising[j], expert_N = np.minimum(other_N, expert_N), np.maximum(other_N, expert_N)
        rising.append(expert_N)
    return torch.from_numpy(np.stack(chosen, axis=1)).long()


def group_limited_choices(scores_NE: Tensor, topk: int, num_groups: int, group_topk: int) -> Tensor:
    """DeepSeek-V3's selection: the best experts of the best groups, a group being worth its two best experts.

    Args:
        scores_NE: float [N, E], with the expert bias added; groups are contiguous.
        topk: K.
        num_groups: expert groups.
        group_topk: groups that a token may use.

    Returns:
        int64 [N, K], by falling score.
    """
    per_group = scores_NE.shape[1] // num_groups
    grouped = scores_NE.unflatten(1, (num_groups, per_group))
    worth, best = grouped.max(2)  # [N, num_groups]
    if per_group > 1:  # twice a maximum takes half the time of a top-2
        worth = worth + grouped.scatter(2, best[:, :, None], -torch.inf).amax(2)
    kept = worth.topk(group_topk, dim=1).indices  # [N, group_topk]
    candidates = grouped.gather(1, kept[:, :, None].expand(-1, -1, per_group))
    best_NK = candidates.flatten(1).topk(topk, dim=1).indices
    return kept.gather(1, best_NK // per_group) * per_group + best_NK % per_group


def full_step(expert_ids_NK: Tensor, request: RoutingRequest) -> RoutingStep:
    """A step in which every rank holds T tokens."""
    source_N = torch.arange(request.num_ranks).repeat_interleave(request.tokens_per_rank)
    return RoutingStep(expert_ids_NK, source_N, request.num_ranks, request.num_experts)


@dataclass(frozen=True)
class Endless:
    """A source with another step for every iteration, in which every rank holds T tokens.

    Attributes:
        family: name that, with seed and iteration, fixes every draw.
        request: sizes and seed.
    """

    family: ClassVar[str]
    request: RoutingRequest

    @property
    def num_distinct(self) -> None:
        """None: there is no end to them."""
        return None

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.request.num_ranks * self.request.tokens_per_rank

    def step(self, iteration: int) -> RoutingStep:
        """Routing of one iteration."""
        return full_step(self.choices(generator(self.family, self.request.seed, iteration)), self.request)

    def choices(self, rng: np.random.Generator) -> Tensor:
        """Draw the experts of all tokens of a step: int64 [N, K]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Uniform(Endless):
    """Any K distinct experts, equally likely: no skew, no correlation, duplicates by chance alone."""

    family = "uniform"

    def choices(self, rng: np.random.Generator) -> Tensor:
        """Experts of all tokens of a step: int64 [N, K]."""
        return uniform_choices(rng, self.request.num_experts, self.num_tokens, self.request.topk)


@dataclass(frozen=True)
class Skewed(Endless):
    """Popularity falls as rank^-exponent; which experts are popular is drawn once per seed and stays.

    Attributes:
        exponent: 0 is uniform, 1 is Zipf's law.

    Raises:
        ValueError: the exponent is negative.
    """

    family = "skewed"
    exponent: float

    def __post_init__(self) -> None:
        if self.exponent < 0:
            raise ValueError(f"exponent={self.exponent} must be at least 0")

    @cached_property
    def by_popularity(self) -> Tensor:
        """Experts by falling popularity: int64 [E]."""
        return torch.from_numpy(generator(self.family, self.request.seed).permutation(self.request.num_experts))

    @cached_property
    def weights_E(self) -> Tensor:
        """Weight of each expert: float32 [E]."""
        weights_E = torch.empty(self.request.num_experts)
        weights_E[self.by_popularity] = torch.arange(1.0, self.request.num_experts + 1) ** -self.exponent
        return weights_E

    def choices(self, rng: np.random.Generator) -> Tensor:
        """Experts of all tokens of a step: int64 [N, K]."""
        return weighted_choices(rng, self.weights_E, self.num_tokens, self.request.topk)


@dataclass(frozen=True)
class GroupLimited(Endless):
    """DeepSeek-V3's router on independent scores: sigmoid of normals plus an expert bias, best groups first.

    Attributes:
        bias_std: standard deviation of the expert bias, drawn once per seed. 0 makes all experts equally popular.

    Raises:
        NotApplicable: the model's router has no group limit.
        ValueError: bias_std is negative.
    """

    family = "group_limited"
    bias_std: float

    def __post_init__(self) -> None:
        if self.request.num_groups is None or self.request.group_topk is None:
            raise NotApplicable("the model's router has no group limit: num_groups is None")
        if self.bias_std < 0:
            raise ValueError(f"bias_std={self.bias_std} must be at least 0")

    @cached_property
    def bias_E(self) -> Tensor:
        """Expert bias: float32 [E]."""
        rng = generator(self.family, self.request.seed)
        return torch.from_numpy(rng.standard_normal(self.request.num_experts, dtype=np.float32)) * self.bias_std

    def choices(self, rng: np.random.Generator) -> Tensor:
        """Experts of all tokens of a step: int64 [N, K]."""
        r = self.request
        assert r.num_groups is not None and r.group_topk is not None  # checked at construction
        normals = rng.standard_normal((self.num_tokens, r.num_experts), dtype=np.float32)
        scores_NE = torch.from_numpy(normals).sigmoid_().add_(self.bias_E)
        return group_limited_choices(scores_NE, r.topk, r.num_groups, r.group_topk)


@dataclass(frozen=True)
class Topic(Endless):
    """Experts that fire together: contiguous tokens of a rank share a topic, and a topic prefers its own experts.

    The experts, shuffled once per seed, are dealt to the topics in equal sets (sizes differ by one where E is not
    divisible), and every run of tokens draws its topic with equal odds. All experts are thus equally loaded in the long
    run: what a placement gains here, it gains from co-activation, not from load.

    Attributes:
        num_topics: 1..E.
        run_length: tokens in a row that share a topic; a new run starts at each rank.
        strength: weight of an expert of the topic relative to all others, at least 1. 1 is uniform.

    Raises:
        ValueError: a parameter is outside its range.
    """

    family = "topic"
    num_topics: int
    run_length: int
    strength: float

    def __post_init__(self) -> None:
        if not 1 <= self.num_topics <= self.request.num_experts:
            raise ValueError(f"num_topics={self.num_topics} is outside 1..num_experts={self.request.num_experts}")
        for name in ("run_length", "strength"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @cached_property
    def topic_E(self) -> Tensor:
        """Topic that each expert belongs to: int64 [E]."""
        num_experts = self.request.num_experts
        position_E = torch.from_numpy(generator(self.family, self.request.seed).permutation(num_experts))
        return position_E * self.num_topics // num_experts

    def topic_of_tokens(self, rng: np.random.Generator) -> Tensor:
        """Draw the topic of every token: int64 [N]."""
        r = self.request
        runs = -(-r.tokens_per_rank // self.run_length)
        topic_GR = torch.from_numpy(rng.integers(0, self.num_topics, (r.num_ranks, runs)))
        return topic_GR.repeat_interleave(self.run_length, dim=1)[:, : r.tokens_per_rank].reshape(-1)

    def choices(self, rng: np.random.Generator) -> Tensor:
        """Experts of all tokens of a step: int64 [N, K]."""
        topic_N = self.topic_of_tokens(rng)
        of_topic = torch.arange(self.num_topics)[:, None] == self.topic_E[None, :]  # [num_topics, E]
        weights = torch.where(of_topic, float(self.strength), 1.0)
        return weighted_choices(rng, weights[topic_N], len(topic_N), self.request.topk)
