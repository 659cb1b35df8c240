"""What a search knows of the routing: expert sets of tokens, equal ones merged, by training step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSets:
    """Weighted expert sets of some training steps of one layer.

    Attributes:
        ids_NK: int64 [N, K], logical experts of each set, rising.
        weight_N: int32 [N], tokens that each set stands for.
        step_N: int64 [N], which step each is of, from 0.
        tokens_S: int64 [S], tokens that each step had; a sample has fewer.
        num_experts: E.
    """

    ids_NK: Tensor
    weight_N: Tensor
    step_N: Tensor
    tokens_S: Tensor
    num_experts: int

    @property
    def num_steps(self) -> int:
        """S."""
        return len(self.tokens_S)

    @property
    def tokens(self) -> int:
        """Tokens that all sets stand for."""
        return int(self.weight_N.sum())

    @classmethod
    def of(cls, expert_ids_NK: Tensor, num_experts: int, step_N: Tensor | None = None) -> "TokenSets":
        """One set for every token.

        Args:
            expert_ids_NK: integer [N, K], logical experts in any order, those of a token all distinct.
            num_experts: E.
            step_N: integer [N], any number for the step of each token; None: all are of one.

        Raises:
            ValueError: no tokens, another shape, or an expert outside 0..E-1.
        """
        if expert_ids_NK.dim() != 2 or not expert_ids_NK.numel():
            raise ValueError(f"expert_ids_NK has shape {list(expert_ids_NK.shape)}; a search needs tokens [N, K]")
        low, high = (int(end) for end in expert_ids_NK.aminmax())
        if low < 0 or high >= num_experts:
            raise ValueError(f"expert_ids_NK names experts {low}..{high}, num_experts is {num_experts}")
        if step_N is not None and step_N.shape != expert_ids_NK.shape[:1]:
            raise ValueError(f"step_N has shape {list(step_N.shape)} for {len(expert_ids_NK)} tokens")
        count = len(expert_ids_NK)
        numbered_N = torch.zeros(count, dtype=torch.int64)
        if step_N is not None:
            numbered_N = torch.unique(step_N, return_inverse=True)[1]
        return cls(
            expert_ids_NK.long().sort(dim=1).values,
            torch.ones(count, dtype=torch.int32),
            numbered_N,
            torch.bincount(numbered_N),
            num_experts,
        )

    @classmethod
    def joined(cls, parts: Sequence["TokenSets"]) -> "TokenSets":
        """The steps of all parts, one after another."""
        first_step = np.cumsum([0, *(part.num_steps for part in parts)]).tolist()
        return cls(
            torch.cat([part.ids_NK for part in parts]),
            torch.cat([part.weight_N for part in parts]),
            torch.cat([part.step_N + first for part, first in zip(parts, first_step, strict=False)]),
            torch.cat([part.tokens_S for part in parts]),
            parts[0].num_experts,
        )

    def by_step(self) -> list["TokenSets"]:
        """Each step alone; undoes :meth:`joined`."""
        parts = []
        for step in range(self.num_steps):
            of = self._chosen(self.step_N == step)
            parts.append(replace(of, step_N=torch.zeros_like(of.step_N), tokens_S=self.tokens_S[step : step + 1]))
        return parts

    def sample(self, count: int, generator: torch.Generator) -> "TokenSets":
        """About so many sets, from every step the same share, equal ones of a step merged."""
        size = len(self.step_N)
        if size <= count:
            return self.merged()
        return self._chosen(torch.randperm(size, generator=generator)[:count].sort().values).merged()

    def merged(self) -> "TokenSets":
        """Equal sets of the same step as one."""
        rows = torch.cat([self.step_N[:, None], self.ids_NK], 1).int().numpy()
        key = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        weight = np.bincount(inverse, weights=self.weight_N.numpy(), minlength=len(first))
        return replace(self._chosen(torch.from_numpy(first)), weight_N=torch.from_numpy(weight).int())

    def pooled(self) -> "TokenSets":
        """All of them as tokens of a single step of mean size."""
        mean = (self.tokens_S.sum() + self.num_steps // 2) // self.num_steps
        return replace(self, step_N=torch.zeros_like(self.step_N), tokens_S=mean.reshape(1)).merged()

    def _chosen(self, which: Tensor) -> "TokenSets":
        """Some sets alone, by number or by mask."""
        return replace(self, ids_NK=self.ids_NK[which], weight_N=self.weight_N[which], step_N=self.step_N[which])

    def coactivation(self) -> Tensor:
        """Tokens that select both of two experts: int64 [E, E], zero on the diagonal."""
        experts, topk = self.num_experts, self.ids_NK.shape[1]
        pair = (self.ids_NK[:, :, None] * experts + self.ids_NK[:, None, :]).view(-1)
        weight = self.weight_N.long().repeat_interleave(topk * topk)
        together = torch.zeros(experts * experts, dtype=torch.int64).index_add_(0, pair, weight)
        return together.view(experts, experts).fill_diagonal_(0)
