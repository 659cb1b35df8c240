"""Maximum functions for Q: the plain maximum and two smooth ones that also see the runners-up (paper, Sec. IV)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hiermoe.records.choices import unknown

MAX_FUNCTIONS = ("plain", "smooth", "logsumexp")


@dataclass(frozen=True)
class MaxFunction:
    """Maximum over groups, homogeneous of degree 1 in its argument.

    ``plain``: max(x). ``smooth``: max(x) * (sum (x_i / max(x))^gamma)^(1/gamma). ``logsumexp``: max(x) / gamma *
    log(sum exp(gamma * x_i / max(x))). The smooth ones exceed the maximum, so they rank placements and price nothing.
    """

    kind: Literal["plain", "smooth", "logsumexp"] = "smooth"
    gamma: float = 10.0

    def __post_init__(self) -> None:
        if self.kind not in MAX_FUNCTIONS:
            raise unknown("max_function", self.kind, MAX_FUNCTIONS)
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma={self.gamma} is not a positive number")

    def __call__(self, x: Tensor) -> Tensor:
        """Value over the last axis: float64 [..., U] -> [...]; 0 where all of x is 0."""
        peak = x.amax(-1)
        if self.kind == "plain":
            return peak
        ratio = x / peak.clamp(min=1e-300)[..., None]
        if self.kind == "smooth":
            return peak * ratio.pow(self.gamma).sum(-1).pow(1 / self.gamma)
        return peak / self.gamma * torch.logsumexp(self.gamma * ratio, -1)

    def after_replacing(self, x_U: Tensor, ab_P: Tensor, new_2P: Tensor) -> Tensor:
        """Value after two elements of x, a and b, change, for every pair of a list.

        Args:
            x_U: int [U].
            ab_P: int64 [P], a * U + b; a and b differ.
            new_2P: int [2, P], new values of x[a] and x[b].

        Returns:
            float64 [P].
        """
        if not len(ab_P):
            return torch.zeros(0, dtype=torch.float64)
        x_U = x_U.double()
        if self.kind == "plain":
            others_P = _without_two(x_U, torch.cummax).view(-1).index_select(0, ab_P)
            return torch.maximum(others_P, new_2P.amax(0))
        if self.kind == "smooth":  # a gamma-norm: the scale cancels, so the old maximum serves for all pairs
            scale = float(x_U.max().clamp(min=1.0))
            total_P = _without_two((x_U / scale).pow(self.gamma), torch.cumsum).view(-1).index_select(0, ab_P)
            low, high = (int(end) for end in new_2P.aminmax())
            power_of = (torch.arange(low, high + 1, dtype=torch.float64) / scale).pow(self.gamma)  # few counts differ
            for new_P in new_2P:
                total_P += power_of.index_select(0, new_P - low)
            return total_P.log_().div_(self.gamma).exp_().mul_(scale)  # takes half the time of pow
        x_PU = x_U.repeat(len(ab_P), 1)
        for element_P, new_P in zip((ab_P // len(x_U), ab_P % len(x_U)), new_2P, strict=True):
            x_PU.scatter_(1, element_P[:, None], new_P[:, None].double())
        return self(x_PU)


def _without_two(x_U: Tensor, accumulate: Callable[[Tensor, int], Any]) -> Tensor:
    """Sum or maximum over all elements but two: float64 [U, U], symmetric; the diagonal has no meaning.

    Built from running results before, between and behind the two, so nothing is subtracted and nothing cancels.
    """

    def running(x: Tensor) -> Tensor:
        result = accumulate(x, -1)
        return result if isinstance(result, Tensor) else result.values

    size = len(x_U)
    zero = x_U.new_zeros(1)
    before = running(torch.cat([zero, x_U[:-1]]))
    behind = running(torch.cat([zero, x_U.flip(0)[:-1]])).flip(0)
    between = running(torch.where(torch.arange(size)[None, :] > torch.arange(size)[:, None], x_U, 0.0))
    between = torch.cat([x_U.new_zeros(size, 1), between[:, :-1]], 1)
    if accumulate is torch.cumsum:
        upper = before[:, None] + between + behind[None, :]
    else:
        upper = torch.maximum(torch.maximum(before[:, None], between), behind[None, :])
    upper = upper.triu(1)
    return upper + upper.T
