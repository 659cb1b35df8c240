"""Maximum functions for Q: the plain maximum and two smooth ones that also see the runners-up (paper, Sec. IV)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

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
            raise ValueError(f"max function {self.kind!r} is unknown; choose from {', '.join(MAX_FUNCTIONS)}")
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

    def after_replacing(self, x_U: Tensor, a_E: Tensor, new_a_EE: Tensor) -> Tensor:
        """Value after two elements of x change, for every pair (r, c): x[a[r]] and x[a[c]].

        Args:
            x_U: float64 [U].
            a_E: int64 [E], element that belongs to r.
            new_a_EE: float64 [E, E]; ``new_a_EE[r, c]`` is the new value of x[a[r]] when r and c change places.

        Returns:
            float64 [E, E]; where a[r] == a[c] nothing changes.
        """
        new_b_EE = new_a_EE.T
        if self.kind == "plain":
            others = _without_two(x_U, torch.cummax)[a_E][:, a_E]
            value = torch.maximum(others, torch.maximum(new_a_EE, new_b_EE))
        elif self.kind == "smooth":  # a gamma-norm: the scale cancels, so the old maximum serves for all pairs
            scale = x_U.max().clamp(min=1.0)
            others = _without_two((x_U / scale).pow(self.gamma), torch.cumsum)[a_E][:, a_E]
            powers = (new_a_EE / scale).pow(self.gamma)
            value = scale * (others + powers + powers.T).pow(1 / self.gamma)
        else:
            x_EEU = x_U.expand(*new_a_EE.shape, -1).clone()
            x_EEU.scatter_(2, a_E[:, None, None].expand(*new_a_EE.shape, 1), new_a_EE[..., None])
            x_EEU.scatter_(2, a_E[None, :, None].expand(*new_a_EE.shape, 1), new_b_EE[..., None])
            value = self(x_EEU)
        return torch.where(a_E[:, None] == a_E[None, :], self(x_U), value)


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
