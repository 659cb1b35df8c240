"""What AlltoAll times and migration mean for a whole step.

Nobody published the compute time of the paper's (readings 5 to 7): it follows from AlltoAll's share of a step, or from
a profile of what a GPU computes with.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from hiermoe.analysis.expert_time import expert_ms
from hiermoe.policies.copies import PASSES_PER_STEP
from hiermoe.policies.price_of_moving import STATE_BYTES_PER_PARAMETER, WEIGHT_BYTES_PER_PARAMETER

PUBLISHED_SHARES = (0.30, 0.60)  # of AlltoAll in a training step, before any of it is saved (paper, Sec. I)


@dataclass(frozen=True)
class Compute:
    """What a GPU computes in a step, and with what.

    Attributes:
        dense_parameters: weights that every token of a layer with experts meets beside its experts, what layers without
            experts have included.
        expert_parameters: of one expert.
        dense_tflops: that a GPU reaches on the former.
        expert_tflops: that it reaches on experts.
        hidden: share of the AlltoAlls that passes beside all this, 0 to 1.
    """

    dense_parameters: int
    expert_parameters: int
    dense_tflops: float
    expert_tflops: float
    hidden: float

    def layer_ms(self, tokens: float, expert_rows: np.ndarray) -> np.ndarray:
        """Forward and backward of one layer, in ms, of the GPU that has most rows: the others wait for it.

        Two operations a weight and pass. Attention between tokens, which has no weights, is left out.

        Args:
            tokens: of a GPU.
            expert_rows: of the busiest GPU: any shape.
        """
        operations = 2 * PASSES_PER_STEP / 1e9  # of one weight and row; TFLOP/s are 1e9 a ms
        dense_ms = operations * tokens * self.dense_parameters / self.dense_tflops
        return dense_ms + expert_ms(expert_rows, self.expert_parameters, self.expert_tflops)


def whole_step_ms(compute_ms: Any, communication_ms: Any, hidden: float = 0.0) -> Any:
    """Time of a step: its computation, and what of its communication no computation hides.

    Args:
        compute_ms: of the busiest GPU: a number or an array, as the communication and the result.
        communication_ms: AlltoAlls; what moves experts too, where it makes the step wait.
        hidden: share of the communication that passes beside computation, as far as there is so much of that.
    """
    return compute_ms + communication_ms - np.minimum(hidden * communication_ms, compute_ms)


def share_needed(end_to_end: float, alltoall: float) -> float:
    """Share of the baseline's step that AlltoAll must have had for two speed-ups over it to agree (reading 6).

    Args:
        end_to_end: speed-up of the step.
        alltoall: speed-up of the AlltoAlls, not 1.
    """
    return (1 - 1 / end_to_end) / (1 - 1 / alltoall)


def step_speedup(share: float | np.ndarray, communication: float) -> float | np.ndarray:
    """Speed-up of a step of which only the communication changes.

    Args:
        share: of the baseline's step that its AlltoAlls take.
        communication: AlltoAll and migration of the system over the baseline's AlltoAll (and migration).
    """
    return 1 / whole_step_ms(1 - share, share * communication)


@dataclass(frozen=True)
class MigrationPrice:
    """One way to price what a placement update moves."""

    state: str  # what moves with an expert
    rate: str  # at which bandwidth
    column: str  # of the records, which price the full state
    factor: float

    @property
    def label(self) -> str:
        """For tables and legends."""
        return f"{self.state}, {self.rate}"

    def of(self, steps: pd.DataFrame) -> np.ndarray:
        """Milliseconds after each step, one layer."""
        return steps[self.column].to_numpy(float) * self.factor


def migration_prices() -> Iterator[MigrationPrice]:
    """Weights alone and full state, at the link's rate and at the rate that the AlltoAll reaches (reading 7)."""
    for state, factor in (
        ("weights", WEIGHT_BYTES_PER_PARAMETER / STATE_BYTES_PER_PARAMETER),
        ("full state", 1.0),
    ):
        yield MigrationPrice(state, "link rate", "migration_link_ms", factor)
        yield MigrationPrice(state, "AlltoAll rate", "migration_alltoall_ms", factor)


FULL_STATE_AT_LINK = next(p for p in migration_prices() if (p.state, p.rate) == ("full state", "link rate"))


def migration_share(system: pd.DataFrame, megatron: pd.DataFrame, price: MigrationPrice, share: float) -> float:
    """Share of a system's step that its migration takes.

    Args:
        system: step rows of the system.
        megatron: step rows of Megatron-LM over the same iterations.
        price: of a move.
        share: AlltoAll's share of Megatron-LM's step; it bounds the compute time that both have.
    """
    compute_ms = megatron["step_ms"].sum() * (1 - share) / share
    migration_ms = price.of(system).sum()
    return float(migration_ms / whole_step_ms(compute_ms, system["step_ms"].sum() + migration_ms))
