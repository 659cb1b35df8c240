"""A sample of a step's expert sets as one vector that ranks and micro-batches sum.

Policies may exchange sums only, and a rank does not know which one it is. So every expert set is hashed to one of C
cells, where its sorted experts and a count are added up. After the sum a cell with a single distinct set gives it back:
each of the K sums divided by the count is an expert, and what comes out hashes to the cell again. Cells where sets
collide fail that test (one in 2^13 passes by chance, with 8192 cells) and are left out, whatever their sets weigh, so
what is left is a fair sample of the distinct sets, equal ones merged over all ranks. Where a step has more distinct
sets than cells, only those whose hash has some zero bits take part; their number follows from earlier sums.

Counts of pairs of experts would be smaller (E * E), but they cannot tell how many groups a token needs: partitioned by
them alone, recorded DeepSeek-V3 routing took a tenth longer than with experts in order.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hiermoe.planner.token_sets import TokenSets

_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64
WANTED_LOAD = 1.0  # distinct sets per cell that leave the most cells with exactly one


@dataclass(frozen=True)
class Sketch:
    """How expert sets become a vector.

    Attributes:
        cells: C, a power of two.
        zero_bits: only sets whose hash has so many zero bits take part, one in 2^zero_bits.
    """

    cells: int
    zero_bits: int = 0

    def __post_init__(self) -> None:
        if self.cells < 2 or self.cells & (self.cells - 1):
            raise ValueError(f"cells={self.cells} is not a power of two above 1")

    def measure(self, expert_ids_NK: Tensor) -> Tensor:
        """Add tokens up.

        Args:
            expert_ids_NK: int64 [N, K], logical experts in any order.

        Returns:
            int32 [C * (K + 1) + 1]: of every cell the sums of the sorted experts and the count; last, N. 295 kB for
            8192 cells and K = 8. A cell overflows at 2^31 / E equal sets.
        """
        ids_NK = expert_ids_NK.sort(dim=1).values
        cell_N, taken_N = self._place(ids_NK)
        rows = torch.cat([ids_NK, torch.ones_like(ids_NK[:, :1])], 1)[taken_N].int()
        sums = torch.zeros(self.cells, rows.shape[1], dtype=torch.int32).index_add_(0, cell_N[taken_N], rows)
        return torch.cat([sums.view(-1), torch.tensor([len(ids_NK)], dtype=torch.int32)])

    def read(self, summed: Tensor, num_experts: int) -> TokenSets:
        """The sets that had a cell for themselves, as one step; a set stands for 2^zero_bits times its tokens."""
        sums = summed[:-1].view(self.cells, -1).long()
        count = sums[:, -1:]
        filled = sums[:, -1] > 0
        ids = sums[:, :-1] // count.clamp(min=1)
        whole = (ids * count == sums[:, :-1]).all(1)
        rising = (ids[:, 1:] > ids[:, :-1]).all(1) & (ids[:, -1] < num_experts)
        cell, taken = self._place(ids)
        single = filled & whole & rising & taken & (cell == torch.arange(self.cells))
        weight = (count[single, 0] << self.zero_bits).clamp(max=2**31 - 1).int()
        step = torch.zeros(len(weight), dtype=torch.int64)
        return TokenSets(ids[single], weight, step, summed[-1:].long(), num_experts)

    def adapted(self, summed: Tensor) -> "Sketch":
        """The sketch for the next step: as many sets take part as the cells can hold best."""
        empty = int((summed[:-1].view(self.cells, -1)[:, -1] == 0).sum())
        load = math.log(self.cells / max(empty, 0.5))  # of cells filled at random
        return Sketch(self.cells, max(0, self.zero_bits + round(math.log2(max(load, 1e-3) / WANTED_LOAD))))

    def _place(self, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Cell of every set, and whether it takes part: int64 [N], bool [N]."""
        hash_N = torch.zeros(len(ids_NK), dtype=torch.int64)
        for expert_N in ids_NK.unbind(1):  # K of them
            hash_N = _mixed(hash_N + expert_N + 1)
        return hash_N & (self.cells - 1), (hash_N >> 32) & ((1 << self.zero_bits) - 1) == 0


def _mixed(x: Tensor) -> Tensor:
    """splitmix64, modulo 2^64 as int64 wraps; right shifts are made logical."""
    x = x + _signed(_MULTIPLIERS[0])
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(_MULTIPLIERS[1])
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(_MULTIPLIERS[2])
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
