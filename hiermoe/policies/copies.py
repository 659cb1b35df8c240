"""HierMoE with copies: homes by HierD-ES, and for every micro-batch the copies that pay.

Experts are at home where HierD-ES swaps them, by the tokens of past steps. Before a micro-batch, from its exact counts,
the busiest GPUs lend tokens to others as far as what that saves exceeds weights and gradients on the links
(:mod:`hiermoe.policies.copy_plan`). How many rows a group saves or gets by that, its deduplication, is known from the
swap statistics of the step before.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hiermoe.planner.cost import ALLTOALLS_PER_STEP, time_by_groups
from hiermoe.policies.copy_plan import Demand, Links, priced_copies, with_copies
from hiermoe.policies.hierd_es import HierDESPolicy
from hiermoe.policies.price_of_moving import WEIGHT_BYTES_PER_PARAMETER
from hiermoe.policies.protocol import CopyTerms, PlacementUpdate, StepContext
from hiermoe.policies.swap import SwapStatistics
from hiermoe.topology.placement import Placement


class PricedCopiesPolicy(HierDESPolicy):
    """HierD-ES at home, and copies where they pay."""

    def __init__(
        self,
        interval: int = 1,
        max_function: str = "smooth",
        gamma: float = 10.0,
        spare: int = 2,
        tflops: float | None = None,
        shared_buffers: bool = True,
        gradient_bytes: int = 2,
    ) -> None:
        """Set the policy up for one layer.

        Args:
            interval: iterations between swaps.
            max_function: plain, smooth or logsumexp, of swaps.
            gamma: sharpness of the smooth ones.
            spare: slots a GPU beyond its own experts.
            tflops: what a GPU computes with, 10^12 operations a second; None: computation is not priced.
            shared_buffers: whether layers share the slots.
            gradient_bytes: of a parameter.

        Raises:
            ValueError: as `HierDESPolicy`; no slot, a rate that is not positive, or another number of bytes.
        """
        super().__init__(interval, max_function, gamma)
        if spare < 1 or (tflops is not None and tflops <= 0):
            raise ValueError(f"spare={spare} must be at least 1, and tflops={tflops} positive or null")
        self.spare, self.tflops = spare, tflops
        self.copies = CopyTerms(shared_buffers, gradient_bytes)
        self._load_E: Tensor | None = None
        self._shares: tuple[Tensor, ...] = ()
        self._dimension = 0

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        """HierD-ES's swap."""
        self._scheme = context.scheme
        if summed is not None and self._load_E is not None:
            stats = SwapStatistics.unpack(summed, placement.num_experts, context.cluster.hierarchy)
            load_E, slot_E = self._load_E.double().clamp(min=1), placement.slot_E
            self._needed = [c.needed_U.double() for c in stats.levels]
            self._leaving = [(c.alone_E[slot_E] / load_E).numpy() for c in stats.levels]
            self._coming = [(c.absent_UE[:, slot_E] / load_E).numpy() for c in stats.levels]
            rank_E = placement.rank_of(context.cluster.hierarchy.num_ranks)
            self._pairs = [
                torch.bincount(rank_E // context.cluster.hierarchy.lanes(i), self._load_E.double(), u)
                for i, u in enumerate(context.cluster.hierarchy.groups, 1)
            ]
        self._load_E = None
        return super().decide(summed, placement, context)

    def rebalance(self, pairs_GE: Tensor, placement: Placement, context: StepContext) -> Placement | None:
        """The copies that pay."""
        hierarchy = context.cluster.hierarchy
        load_E, rank_E = pairs_GE.sum(0), placement.rank_of(hierarchy.num_ranks)
        self._load_E = load_E if self._load_E is None else self._load_E + load_E
        scheme = getattr(self, "_scheme", context.scheme)
        rows, leaving, coming = [], [], []
        for i, u in enumerate(hierarchy.groups, 1):
            p = torch.bincount(rank_E // hierarchy.lanes(i), load_E.double(), u)
            if hasattr(self, "_needed"):
                rows.append((p * (self._needed[i - 1] / self._pairs[i - 1].clamp(min=1))).numpy())
                leaving.append(self._leaving[i - 1]); coming.append(self._coming[i - 1])
            else:
                rows.append(p.numpy()); leaving.append(torch.ones(len(load_E)).double().numpy())
                coming.append(torch.ones(u, len(load_E)).double().numpy())
        demand = Demand(load_E.numpy(), rank_E.numpy(), tuple(rows), tuple(leaving), tuple(coming))
        terms = self.copies
        bytes_each = ((2 if terms.shared_buffers else 1) * WEIGHT_BYTES_PER_PARAMETER + terms.gradient_bytes) * context.expert_parameters
        links = Links(hierarchy, [bytes_each / (s.link_gb_per_s * 1e6) for s in context.cluster.levels])
        rate = 0 if self.tflops is None else 3 * 2 * context.expert_parameters / (self.tflops * 1e9)

        def step_ms(busiest: Sequence[float], link_ms: float, expert_rows: float) -> float:
            return ALLTOALLS_PER_STEP * time_by_groups(scheme, lambda level: busiest[level - 1], context.cluster, context.row_bytes) + link_ms + rate * expert_rows

        copies = priced_copies(demand, links, self.spare, step_ms)
        return with_copies(pairs_GE, placement, copies, self.spare, hierarchy)
