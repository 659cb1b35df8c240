"""Rows through stages in chunks, so that one chunk is in a stage while the chunk before it is in the next."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Leg(NamedTuple):
    """One stage of a chunk.

    Attributes:
        begin: to exchange, beside others or not; hands out what waits for the rows.
        after: what becomes of rows that have arrived.
    """

    begin: Callable[[Tensor, bool], Callable[[], Tensor]]
    after: Callable[[Tensor], Tensor] = lambda x_RM: x_RM


def in_waves(x_RM: Tensor, legs: Sequence[Leg], chunks: int) -> Tensor:
    """Columns in chunks through all legs: in wave w chunk c passes leg w - c, all of them at a time.

    Sums are over rows, so how columns are cut changes no value.
    """
    parts = list(x_RM.tensor_split(chunks, dim=1))
    for wave in range(len(legs) + chunks - 1):
        passing = [c for c in range(chunks) if 0 <= wave - c < len(legs)]  # those ahead begin first
        begun = [legs[wave - c].begin(parts[c], chunks > 1) for c in passing]
        arrived = [wait() for wait in begun]
        for c, rows in zip(passing, arrived, strict=True):
            parts[c] = legs[wave - c].after(rows)
    return parts[0] if chunks == 1 else torch.cat(parts, dim=1)
