"""HierMoE with copies: HierD-ES swaps that also see computation, and for every micro-batch the copies that pay.

What moves once and helps for long is a swap, so homes come first: HierD-ES's swaps, chosen by the AlltoAlls as ever and
by the busiest GPU's expert time beside them. The best of thousands of swaps looks better than it is on the tokens that
it was chosen on. So it is made one update later, if on the tokens of that step too it saves more within its horizon
than its migration takes, in smooth maxima. What a micro-batch's own counts leave uneven is for copies, which cost
weights and gradients in every step: as many as save more than that (:mod:`hiermoe.policies.copy_plan`). How many rows
they save is known from the swap statistics of the step before: which tokens have no other expert in a group.
"""

import numpy as np
import torch
from torch import Tensor

from hiermoe.planner.cost import ALLTOALLS_PER_STEP, time_by_groups
from hiermoe.planner.scheme import every_dimension
from hiermoe.policies.copy_plan import Demand, Prefixes, priced_copies, with_copies
from hiermoe.policies.hierd_es import PLAIN, HierDESPolicy
from hiermoe.policies.price_of_moving import WEIGHT_BYTES_PER_PARAMETER
from hiermoe.policies.protocol import CopyTerms, PlacementUpdate, StepContext
from hiermoe.policies.swap import SwapStatistics, SwapTimes, swap_times, time_of_groups
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement

PASSES_PER_STEP = 3  # forward, and the gradients of inputs and of weights
_SHARES = ("rows", "leaving", "coming")  # remembered, levels end to end


class PricedCopiesPolicy(HierDESPolicy):
    """HierD-ES beside computation, and copies where they pay."""

    def __init__(
        self,
        interval: int = 1,
        max_function: str = "smooth",
        gamma: float = 10.0,
        horizon: int = 100,
        max_swaps: int = 1,
        spare: int = 2,
        tflops: float = 100.0,
        shared_buffers: bool = True,
        gradient_bytes: int = 2,
    ) -> None:
        """Set the policy up for one layer.

        Args:
            interval: iterations between swaps.
            max_function: plain, smooth or logsumexp, of swaps.
            gamma: sharpness of the smooth ones.
            horizon: iterations that a swap may take to pay.
            max_swaps: swaps that are chosen in one update.
            spare: slots a GPU beyond its own experts.
            tflops: what a GPU computes with, 10^12 operations a second.
            shared_buffers: whether layers share the slots.
            gradient_bytes: of a parameter.

        Raises:
            ValueError: as `HierDESPolicy`; no slot, a rate that is not positive, or another number of bytes.
        """
        super().__init__(interval, max_function, gamma, gated=True, horizon=horizon, max_swaps=max_swaps)
        if spare < 1 or tflops <= 0:
            raise ValueError(f"spare={spare} must be at least 1, and tflops={tflops} positive")
        self.spare, self.tflops = spare, tflops
        self.copies = self._terms = CopyTerms(shared_buffers, gradient_bytes)
        self._load_E: Tensor | None = None  # since the last decision
        self._shares: dict[str, Tensor] = {}
        self._chosen: list[tuple[int, int]] = []  # slots to exchange, not made yet

    def decides_after(self, iteration: int) -> bool:
        """Always: what `rebalance` has counted is of one iteration."""
        return True

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        """Of the swaps that were chosen on the tokens of the step before, those that pay on this one's; then choose."""
        load_E, self._load_E = self._load_E, None
        if summed is None or load_E is None:
            return None
        stats = SwapStatistics.unpack(summed, placement.num_experts, context.cluster.hierarchy)
        self._shares = shares_of(stats, load_E, placement)
        load_S = load_E[placement.expert_at_S]

        def swapped(pair: tuple[int, int]) -> tuple[Placement, SwapStatistics, Tensor]:
            exchanged_S = load_S.clone()
            exchanged_S[list(pair)] = load_S[list(pair[::-1])]
            r, c = planned.expert_at_S[list(pair)].tolist()
            return planned.swapped(r, c), stats.swapped(*pair), exchanged_S

        first_ms, now_ms = _alltoalls_ms(stats, context), self._smooth_ms(stats, load_S, context)
        planned = placement
        for pair in self._chosen:
            after = swapped(pair)
            after_ms = self._smooth_ms(*after[1:], context)
            if self._pays(now_ms - after_ms, planned, after[0], context):
                (planned, stats, load_S), now_ms = after, after_ms
        update = None
        if planned is not placement:
            update = PlacementUpdate(planned, first_ms - _alltoalls_ms(stats, context))
        self._chosen = []
        while len(self._chosen) < self.max_swaps and (pair := self._times(stats, load_S, context).best()) is not None:
            after = swapped(pair)
            after_ms = self._smooth_ms(*after[1:], context)
            if not self._pays(now_ms - after_ms, planned, after[0], context):
                break
            (planned, stats, load_S), now_ms = after, after_ms
            self._chosen.append(pair)
        return update

    def rebalance(self, pairs_GE: Tensor, placement: Placement, context: StepContext) -> Placement | None:
        """The copies that pay; priced as if every HDd could be chosen."""
        hierarchy, load_E = context.cluster.hierarchy, pairs_GE.sum(0)
        self._load_E = load_E if self._load_E is None else self._load_E + load_E
        parameters, sends = context.expert_parameters, 2 if self._terms.shared_buffers else 1
        copy_bytes = (sends * WEIGHT_BYTES_PER_PARAMETER + self._terms.gradient_bytes) * parameters
        level_ms = [copy_bytes / (level.link_gb_per_s * 1e6) for level in context.cluster.levels]
        schemes, row_ms = every_dimension(hierarchy), self._row_ms(context)

        def step_ms(after: Prefixes) -> np.ndarray:
            times = [
                time_by_groups(scheme, lambda level: after.rows_Dn[level - 1], context.cluster, context.row_bytes)
                for scheme in schemes
            ]
            return ALLTOALLS_PER_STEP * np.min(times, axis=0) + after.link_ms_n + row_ms * after.load_n

        demand = demand_of(load_E, placement, self._shares, hierarchy)
        copies = priced_copies(demand, hierarchy, level_ms, self.spare, step_ms)
        return with_copies(pairs_GE, placement, copies, self.spare, hierarchy)

    def _times(self, stats: SwapStatistics, load_S: Tensor, context: StepContext) -> SwapTimes:
        """Q of a step after every swap, and the busiest GPU's computation."""
        times = swap_times(stats, context.scheme, context.cluster, context.row_bytes, self.max_function)
        load_R, per_rank = _by_gpu(load_S, context), len(load_S) // context.cluster.hierarchy.num_ranks
        rank_2P, load_2P = times.slots_2P // per_rank, load_S[times.slots_2P]
        new_2P = load_R[rank_2P] - load_2P + load_2P.flip(0)
        busiest_P = self.max_function.after_replacing(load_R, rank_2P[0] * len(load_R) + rank_2P[1], new_2P)
        row_ms = self._row_ms(context)
        now_ms = ALLTOALLS_PER_STEP * times.now_ms + row_ms * float(self.max_function(load_R.double()))
        return SwapTimes(times.slots_2P, now_ms, ALLTOALLS_PER_STEP * times.after_ms_P + row_ms * busiest_P)

    def _smooth_ms(self, stats: SwapStatistics, load_S: Tensor, context: StepContext) -> float:
        """Q of a step without a swap, and computation: smooth, so that the next busiest groups count too."""
        priced = context.scheme, context.cluster, context.row_bytes, self.max_function
        busiest = float(self.max_function(_by_gpu(load_S, context).double()))
        return ALLTOALLS_PER_STEP * time_of_groups(stats.needed, *priced) + self._row_ms(context) * busiest

    def _row_ms(self, context: StepContext) -> float:
        """What a step computes with one expert row."""
        return PASSES_PER_STEP * 2 * context.expert_parameters / (self.tflops * 1e9)

    def state_dict(self) -> dict[str, Tensor]:
        """What is known of tokens' shares, swaps to be judged (int64 [n, 2], slots), tokens since the last decision."""
        chosen = torch.tensor(self._chosen, dtype=torch.int64).view(-1, 2)
        return {"chosen": chosen} | self._shares | ({} if self._load_E is None else {"load_E": self._load_E})

    def shared_state(self) -> None:
        """Every rank decides: `rebalance` needs all that is remembered."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: the state of another policy.
        """
        if state.keys() - {"chosen", "load_E", *_SHARES}:
            known = ", ".join(("chosen", "load_E", *_SHARES))
            raise ValueError(f"PricedCopiesPolicy remembers {known}; the state has {', '.join(state)}")
        self._chosen = [(r, c) for r, c in state["chosen"].tolist()] if "chosen" in state else []
        self._load_E = state.get("load_E")
        self._shares = {name: state[name] for name in _SHARES if name in state}


def _by_gpu(load_S: Tensor, context: StepContext) -> Tensor:
    """Expert rows of every GPU: int64 [G]."""
    return load_S.view(context.cluster.hierarchy.num_ranks, -1).sum(1)


def _alltoalls_ms(stats: SwapStatistics, context: StepContext) -> float:
    """The four of a step, plain maximum."""
    return ALLTOALLS_PER_STEP * time_of_groups(stats.needed, context.scheme, context.cluster, context.row_bytes, PLAIN)


def shares_of(stats: SwapStatistics, load_E: Tensor, placement: Placement) -> dict[str, Tensor]:
    """What a step teaches about tokens of later ones, levels 1..D end to end.

    Args:
        stats: of the step.
        load_E: int64 [E], its tokens of each expert.
        placement: where they sat.

    Returns:
        rows: float64 [U summed], tokens that need a group for each of its pairs; leaving: float64 [D, E], of an
        expert's tokens those without another one in its group; coming: float64 [U summed, E], those that need nothing
        in a group.
    """
    tokens_E, slot_E, load_S = load_E.double().clamp(min=1), placement.slot_E, load_E[placement.expert_at_S].double()
    pairs = [load_S.view(len(counts.needed_U), -1).sum(1) for counts in stats.levels]
    return {
        "rows": torch.cat([c.needed_U / pairs_U.clamp(min=1) for c, pairs_U in zip(stats.levels, pairs, strict=True)]),
        "leaving": torch.stack([counts.alone_E[slot_E] / tokens_E for counts in stats.levels]),
        "coming": torch.cat([counts.absent_UE[:, slot_E] / tokens_E for counts in stats.levels]),
    }


def demand_of(load_E: Tensor, placement: Placement, shares: dict[str, Tensor], hierarchy: Hierarchy) -> Demand:
    """A micro-batch's counts, with what is known of its tokens; without that every pair is a row of its own.

    Args:
        load_E: int64 [E], tokens of each expert.
        placement: where they are at home.
        shares: of :func:`shares_of`, of an earlier step; empty where there was none.
        hierarchy: groups of GPUs.
    """
    experts, groups = len(load_E), list(hierarchy.groups)
    known = shares or {
        "rows": torch.ones(sum(groups), dtype=torch.float64),
        "leaving": torch.ones(len(groups), experts, dtype=torch.float64),
        "coming": torch.ones(sum(groups), experts, dtype=torch.float64),
    }
    load_S = load_E[placement.expert_at_S].double()
    pairs_U = torch.cat([load_S.view(number, -1).sum(1) for number in groups])
    return Demand(
        load_E.numpy(),
        placement.rank_of(hierarchy.num_ranks).numpy(),
        tuple(part.numpy() for part in (pairs_U * known["rows"]).split(groups)),
        tuple(known["leaving"].numpy()),
        tuple(part.numpy() for part in known["coming"].split(groups)),
    )
