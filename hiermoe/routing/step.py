"""One training step's routing of one MoE layer, and where such steps come from."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingStep:
    """Which experts the tokens of all ranks chose in one step of one layer.

    Attributes:
        expert_ids_NK: int64 [N, K], logical experts, each token's by falling router score, all distinct.
        source_N: int64 [N], rank that holds the token; tokens stand in rank order.
        num_ranks: G.
        num_experts: E; or S, where slots stay empty and count as experts that nobody chooses.
    """

    expert_ids_NK: Tensor
    source_N: Tensor
    num_ranks: int
    num_experts: int

    def over_slots(self) -> "RoutingStep":
        """The same step for a placement in which the numbers from E on are empty slots."""
        slots = num_slots(self.num_experts, self.num_ranks)
        return self if slots == self.num_experts else replace(self, num_experts=slots)

    @property
    def pairs_GE(self) -> Tensor:
        """int64 [G, E]: tokens of each source that chose each logical expert."""
        code_NK = self.source_N[:, None] * self.num_experts + self.expert_ids_NK
        counts = torch.bincount(code_NK.view(-1), minlength=self.num_ranks * self.num_experts)
        return counts.view(self.num_ranks, self.num_experts)

    @property
    def topk(self) -> int:
        """K, experts per token."""
        return self.expert_ids_NK.shape[1]


def make_step(expert_ids_GTK: Tensor, num_tokens_G: Tensor, num_experts: int) -> RoutingStep:
    """Drop the padding of per-rank token lists.

    Args:
        expert_ids_GTK: integer [G, T, K]; rows from ``num_tokens_G[g]`` on are padding.
        num_tokens_G: integer [G].
        num_experts: E.

    Returns:
        The step of ``num_tokens_G.sum()`` tokens.
    """
    num_ranks, tokens = expert_ids_GTK.shape[:2]
    source_N = torch.arange(num_ranks).repeat_interleave(num_tokens_G.long())
    if len(source_N) == num_ranks * tokens:
        ids_NK = expert_ids_GTK.reshape(num_ranks * tokens, expert_ids_GTK.shape[2])
    else:
        ids_NK = expert_ids_GTK[torch.arange(tokens)[None, :] < num_tokens_G[:, None]]
    return RoutingStep(ids_NK.long(), source_N, num_ranks, num_experts)


def dividing(num_experts: int) -> str:
    """The numbers of GPUs that experts divide over, as a list in words."""
    return ", ".join(str(size) for size in range(1, num_experts + 1) if num_experts % size == 0)


def num_slots(num_experts: int, num_ranks: int) -> int:
    """S: as many slots as give every GPU equally many, and every expert one; some stay empty where G does not divide E.

    Raises:
        ValueError: E is smaller than G.
    """
    if num_experts < num_ranks:
        raise ValueError(
            f"num_experts={num_experts} is smaller than ep_size={num_ranks}: GPUs would have no expert; "
            f"{dividing(num_experts)} divide it"
        )
    return -(-num_experts // num_ranks) * num_ranks


def experts_per_rank(num_experts: int, num_ranks: int, name: str = "num_experts") -> int:
    """E / G, or S / G of slots.

    Raises:
        ValueError: E is not divisible by G.
    """
    if num_experts % num_ranks:
        raise ValueError(
            f"{name}={num_experts} is not divisible by ep_size={num_ranks}; {dividing(num_experts)} divide it"
        )
    return num_experts // num_ranks


@dataclass(frozen=True)
class RoutingRequest:
    """What a run asks of a routing source.

    Attributes:
        trace: name of the model's recorded trace.
        num_experts: E.
        topk: K.
        num_ranks: G.
        tokens_per_rank: T.
        seed: of synthetic routing.
        num_groups: expert groups of the model's router, None where it has no group limit.
        group_topk: groups that a token may use.

    Raises:
        ValueError: a size below 1, K > E, or groups that do not fit.
    """

    trace: str
    num_experts: int
    topk: int
    num_ranks: int
    tokens_per_rank: int
    seed: int = 0
    num_groups: int | None = None
    group_topk: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_experts", "topk", "num_ranks", "tokens_per_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.topk > self.num_experts:
            raise ValueError(f"topk={self.topk} exceeds num_experts={self.num_experts}")
        if self.num_groups is not None:
            if self.num_groups < 1:
                raise ValueError(f"num_groups={self.num_groups} must be at least 1")
            if self.num_experts % self.num_groups:
                raise ValueError(f"num_experts={self.num_experts} is not divisible by num_groups={self.num_groups}")
            if self.group_topk is None or not 1 <= self.group_topk <= self.num_groups:
                raise ValueError(f"group_topk={self.group_topk} is outside 1..{self.num_groups}")
            if self.topk > self.group_topk * (self.num_experts // self.num_groups):
                raise ValueError(f"topk={self.topk} exceeds the experts of group_topk={self.group_topk} groups")


class RoutingSource(Protocol):
    """Anything that yields routing steps. ``step(i)`` is a function of ``i`` alone."""

    @property
    def num_distinct(self) -> int | None:
        """Number of different iterations, or None if there is no end to them."""
        ...

    def step(self, iteration: int) -> RoutingStep:
        """Routing of one iteration."""
        ...


def iteration_schedule(iterations: int, num_distinct: int | None) -> list[int]:
    """Which of a source's iterations a run walks through.

    A recorded source has ``num_distinct`` iterations, the middle one of an odd number in its first half. A run of that
    length takes them in order. A longer one loops over the first half and ends with the second half, once, in order:
    the second half stays unseen until it is measured. A shorter one takes the last first-half iterations and the first
    second-half ones, an equal number of each (one more of the former in a run of odd length).

    Args:
        iterations: length of the run, at least 2.
        num_distinct: iterations that the source has; None where there is no limit.

    Returns:
        The source's iteration for every iteration of the run.

    Raises:
        ValueError: fewer than two iterations.
    """
    if iterations < 2 or (num_distinct is not None and num_distinct < 2):
        raise ValueError(f"iterations={iterations} of num_distinct={num_distinct}: a run needs at least 2 of each")
    if num_distinct is None:
        return list(range(iterations))
    half = num_distinct - num_distinct // 2
    held_out = min(iterations // 2, num_distinct // 2)
    looped = iterations - held_out
    return [(i - looped) % half for i in range(looped)] + list(range(half, half + held_out))


def first_measured(iterations: int, num_distinct: int | None) -> int:
    """First iteration of the run whose AlltoAll time counts: its last half, held-out iterations only."""
    if num_distinct is None:
        return iterations - iterations // 2
    return iterations - min(iterations // 2, num_distinct // 2)
