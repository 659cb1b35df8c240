"""What AlltoAll times and migration mean for a whole step, whose compute time nobody published (readings 5 to 7)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hiermoe.policies.price_of_moving import STATE_BYTES_PER_PARAMETER, WEIGHT_BYTES_PER_PARAMETER

PUBLISHED_SHARES = (0.30, 0.60)  # of AlltoAll in a training step, before any of it is saved (paper, Sec. I)


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
    return 1 / (1 - share + share * communication)


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
    return float(migration_ms / (compute_ms + system["step_ms"].sum() + migration_ms))
