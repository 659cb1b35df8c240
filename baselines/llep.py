"""Least-loaded expert parallelism (arXiv 2601.17111, public code), written from a description of it.

Where the busiest GPU has lambda times the mean or more, experts are handed out by falling load: home takes what fits
under a cap, the rest goes to the least loaded GPUs in contiguous ranges of tokens. The topology does not enter.
"""

import math

import torch
from torch import Tensor

from baselines.guests import all_at_home, check_spare, cut_in_ranges, with_guests
from hiermoe.policies.protocol import CopyTerms, PlacementPolicy, StepContext
from hiermoe.topology.placement import Placement


class LLEPPolicy(PlacementPolicy):
    """Experts' tokens spread over the least loaded GPUs, for every micro-batch."""

    def __init__(
        self,
        spare: int | None = None,
        threshold: float = 1.3,
        alpha: float = 1.0,
        min_tokens: int = 1024,
        shared_buffers: bool = True,
        gradient_bytes: int = 2,
    ) -> None:
        """Set the policy up for one layer.

        Args:
            spare: slots a GPU beyond its own experts; None: as many as a micro-batch takes.
            threshold: lambda, largest load over the mean below which experts stay.
            alpha: cap of a GPU over the mean load.
            min_tokens: that a chunk has at least, unless it ends its expert.
            shared_buffers: whether layers share the slots.
            gradient_bytes: of a parameter.

        Raises:
            ValueError: no slot, a cap below the mean, or another number of bytes.
        """
        if spare is not None:
            check_spare(spare)
        if alpha < 1:
            raise ValueError(f"alpha={alpha} must be at least 1")
        self.spare, self.threshold, self.alpha, self.min_tokens = spare, threshold, alpha, min_tokens
        self.copies = CopyTerms(shared_buffers, gradient_bytes)

    def rebalance(self, pairs_GE: Tensor, placement: Placement, context: StepContext) -> Placement | None:
        """Chunks of hot experts on the least loaded GPUs; None below lambda."""
        ranks = len(pairs_GE)
        load_E, home_E = pairs_GE.sum(0), placement.rank_of(ranks)
        load_R = torch.zeros(ranks, dtype=torch.int64).index_add_(0, home_E, load_E)
        total = int(load_R.sum())
        if int(load_R.max()) * ranks < self.threshold * total:
            return None
        cap = math.ceil(self.alpha * total / ranks)
        chunks = hand_out(load_E.tolist(), home_E.tolist(), ranks, cap, self.min_tokens, self.spare)
        share_GER = all_at_home(pairs_GE, placement)
        for expert, amounts in enumerate(chunks):
            if set(amounts) - {int(home_E[expert])}:
                amount_R = torch.zeros(ranks, dtype=torch.int64)
                amount_R[list(amounts)] = torch.tensor(list(amounts.values()))
                share_GER[:, expert] = cut_in_ranges(pairs_GE[:, expert], amount_R)
        return with_guests(share_GER, placement, self.spare)


def hand_out(
    load: list[int], home: list[int], ranks: int, cap: int, min_tokens: int, spare: int | None
) -> list[dict[int, int]]:
    """Tokens of every expert by GPU.

    Args:
        load: tokens of every expert.
        home: its GPU.
        ranks: G.
        cap: tokens that a GPU may have, assigned or pending: of experts at home that are not handed out yet.
        min_tokens: of a chunk.
        spare: guests that a GPU may have; None: any number.
    """
    busy = [0] * ranks  # assigned and pending
    for tokens, rank in zip(load, home, strict=True):
        busy[rank] += tokens
    free = [len(load) if spare is None else spare] * ranks
    chunks: list[dict[int, int]] = [{} for _ in load]
    for expert in sorted(range(len(load)), key=lambda e: -load[e]):
        own, mine = home[expert], chunks[expert]
        busy[own] -= load[expert]
        rest = load[expert]
        if (fits := min(rest, max(cap - busy[own], 0))) > 0:
            mine[own] = fits
            busy[own], rest = busy[own] + fits, rest - fits
        able = [rank for rank in range(ranks) if rank != own and free[rank]]
        for rank in sorted(able, key=lambda rank: busy[rank]):
            chunk = min(rest, cap - busy[rank])
            if chunk <= 0 or (chunk < min_tokens and chunk < rest):
                continue
            mine[rank] = chunk
            busy[rank], rest, free[rank] = busy[rank] + chunk, rest - chunk, free[rank] - 1
            if not rest:
                break
        if rest:  # nobody has room: the least loaded takes it all
            able = [rank for rank in range(ranks) if rank == own or free[rank] or rank in mine]
            rank = min(able, key=lambda rank: busy[rank])
            free[rank] -= rank != own and rank not in mine
            mine[rank] = mine.get(rank, 0) + rest
            busy[rank] += rest
    return chunks
