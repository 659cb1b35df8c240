"""FasterMoE's shadowing (PPoPP 2022; fastmoe's `shadow_policy.py`), written from a description of it.

In every iteration the hottest experts are broadcast to all GPUs, as long as its model of a step falls: three times
the computation and four times the exchange of the largest expert that is left, and the broadcasts. All sources use
the copy on their own GPU.
"""

import torch
from torch import Tensor

from baselines.guests import all_at_home, check_spare, with_guests
from hiermoe.policies.price_of_moving import WEIGHT_BYTES_PER_PARAMETER
from hiermoe.policies.protocol import CopyTerms, PlacementPolicy, StepContext
from hiermoe.topology.peers import WORLD
from hiermoe.topology.placement import Placement


class FasterMoEPolicy(PlacementPolicy):
    """Shadows of the hottest experts on all GPUs, for every micro-batch."""

    def __init__(
        self, spare: int | None = None, tflops: float = 100.0, shared_buffers: bool = False, gradient_bytes: int = 2
    ) -> None:
        """Set the policy up for one layer.

        Args:
            spare: shadows at most; None: any number.
            tflops: F, what a GPU computes with, 10^12 operations a second.
            shared_buffers: whether layers share the slots.
            gradient_bytes: of a parameter.

        Raises:
            ValueError: no slot, a rate that is not positive, or another number of bytes.
        """
        if spare is not None:
            check_spare(spare)
        if tflops <= 0:
            raise ValueError(f"tflops={tflops} must be positive")
        self.spare, self.tflops = spare, tflops
        self.copies = CopyTerms(shared_buffers, gradient_bytes, relays_from=1)

    def rebalance(self, pairs_GE: Tensor, placement: Placement, context: StepContext) -> Placement | None:
        """The hottest experts everywhere; None where no broadcast pays."""
        beta_ms = context.cluster.constants(WORLD).beta_ms_per_byte  # 1 / W
        compute_ms = 3 * 2 * context.expert_parameters / (self.tflops * 1e9)
        token_ms = compute_ms + 4 * context.row_bytes.mean * beta_ms
        shadow_ms = WEIGHT_BYTES_PER_PARAMETER * context.expert_parameters * beta_ms
        hot = shadows(pairs_GE.sum(0).tolist(), token_ms, shadow_ms, self.spare)
        if not hot:
            return None
        share_GER, sources = all_at_home(pairs_GE, placement), torch.arange(len(pairs_GE))
        for expert in hot:
            share_GER[:, expert] = 0
            share_GER[sources, expert, sources] = pairs_GE[:, expert]
        return with_guests(share_GER, placement, self.spare)


def shadows(load: list[int], token_ms: float, shadow_ms: float, most: int | None) -> list[int]:
    """The hottest experts, as long as each one more makes the modelled step shorter.

    Args:
        load: tokens of every expert.
        token_ms: of the largest expert that is left, a token.
        shadow_ms: a broadcast.
        most: shadows at most; None: any number.
    """
    order = sorted(range(len(load)), key=lambda expert: -load[expert])
    number = 0
    while number + 1 < len(order) and (most is None or number < most):
        if (load[order[number]] - load[order[number + 1]]) * token_ms <= shadow_ms:
            break
        number += 1
    return order[:number]
