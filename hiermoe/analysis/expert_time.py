"""Time of the busiest GPU's experts in a step at a stated rate: what balance is worth beside AlltoAlls."""

from typing import Any

from hiermoe.policies.copies import PASSES_PER_STEP

TFLOPS = 100.0
"""10^12 operations a second of a GPU in its experts' products, for every cluster alike: what the policies that weigh
computation against links assume too (``tflops`` in conf/system/). An assumption; nobody has measured it here."""


def expert_ms(rows: Any, expert_parameters: int, tflops: float = TFLOPS) -> Any:
    """Time that experts take for so many rows, forward and backward: 2 operations a parameter, row and pass.

    Args:
        rows: token-expert pairs at a GPU: a number, an array or a series, as the result.
        expert_parameters: of one expert.
        tflops: 10^12 operations a second.

    Returns:
        ms.

    Raises:
        ValueError: a rate that is not positive.
    """
    if tflops <= 0:
        raise ValueError(f"tflops={tflops} must be positive")
    return rows * (PASSES_PER_STEP * 2 * expert_parameters / (tflops * 1e9))
