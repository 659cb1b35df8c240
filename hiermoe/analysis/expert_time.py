"""Time of the busiest GPU's experts in a step at a stated rate: what balance is worth beside AlltoAlls."""

import pandas as pd

from hiermoe.policies.copies import PASSES_PER_STEP

TFLOPS = 100.0
"""10^12 operations a second of a GPU in its experts' products, for every cluster alike: what the policies that weigh
computation against links assume too (``tflops`` in conf/system/). An assumption; nobody has measured it here."""


def expert_ms(rows: pd.Series, expert_parameters: int, tflops: float = TFLOPS) -> pd.Series:
    """Time that experts take for so many rows, forward and backward: 2 operations a parameter, row and pass.

    Args:
        rows: token-expert pairs at a GPU, of every iteration.
        expert_parameters: of one expert.
        tflops: 10^12 operations a second.

    Returns:
        ms, float64, of every iteration.

    Raises:
        ValueError: a rate that is not positive.
    """
    if tflops <= 0:
        raise ValueError(f"tflops={tflops} must be positive")
    return rows * (PASSES_PER_STEP * 2 * expert_parameters / (tflops * 1e9))
