"""Copying rows and summing the copies again: the two halves of everything that a dispatcher does locally."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowCopies:
    """Every output row is a copy of one input row; one input row may have any number of copies.

    ``copy`` and ``sum`` are each other's adjoints, so the gradient of either is the other.

    Attributes:
        source_R: int64 [R], input row of every output row; ``num_inputs`` stands for a row of zeros (padding).
        num_inputs: rows of the input.
    """

    source_R: Tensor
    num_inputs: int
    _order_R: Tensor  # outputs by input; those of padding left out
    _first_N: Tensor  # where the outputs of an input start in it
    _has_padding: bool
    _one_to_one: bool

    @classmethod
    def of(cls, source_R: Tensor, num_inputs: int, num_padding: int = 0, all_used: bool = False) -> "RowCopies":
        """Prepare both directions. The host does not wait for a GPU.

        Args:
            source_R: int64 [R], in 0..num_inputs - 1; ``num_inputs`` where the output is padding.
            num_inputs: rows of the input.
            num_padding: number of outputs that are padding.
            all_used: whether every input is known to have a copy; saves time where none has two.
        """
        sorted_R, order_R = torch.sort(source_R, stable=True)
        num_copies = len(source_R) - num_padding
        first_N = torch.searchsorted(sorted_R, torch.arange(num_inputs, device=source_R.device))
        one_to_one = all_used and num_copies == num_inputs
        return cls(source_R, num_inputs, order_R[:num_copies], first_N, num_padding > 0, one_to_one)

    def copy(self, x_NM: Tensor) -> Tensor:
        """Outputs: [R, M] from [num_inputs, M]."""
        if self._has_padding:
            x_NM = torch.cat([x_NM, x_NM.new_zeros(1, x_NM.shape[1])])
        return x_NM.index_select(0, self.source_R)

    def sum(self, y_RM: Tensor) -> Tensor:
        """For every input the sum over its copies: [num_inputs, M] from [R, M].

        Half-precision rows are added in fp32 and rounded once. The order of addition is that of the outputs, so the
        result is the same in every run.
        """
        if self._one_to_one:
            return y_RM.index_select(0, self._order_R)
        if not len(self._order_R):
            return y_RM.new_zeros(self.num_inputs, y_RM.shape[1])
        return F.embedding_bag(self._order_R, y_RM.contiguous(), self._first_N, mode="sum")


def counted(values_N: Tensor, num_kinds: int) -> Tensor:
    """How often each of 0..num_kinds - 1 occurs: int64 [num_kinds]. As `torch.bincount`, which has the host wait."""
    return values_N.new_zeros(num_kinds).scatter_add_(0, values_N, torch.ones_like(values_N))
