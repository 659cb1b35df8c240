"""UltraEP's balancing of every micro-batch (arXiv 2606.04101, public code), written from a description of it.

Replicas stay inside the NVLink domain of their expert's home, so that the domains a token visits never change. For
every domain the smallest threshold t is searched up to which loads can be cut: ranks above t give tokens of their
hottest experts to the ranks with most slack. Tokens of a replica's own GPU use it first; what a source has left is
shared over the other copies by what they still take. Weights and gradients (fp32) travel inside the domain; layers
share the slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.guests import all_at_home, check_spare, domain_level, with_guests
from hiermoe.policies.protocol import CopyTerms, PlacementPolicy, StepContext
from hiermoe.topology.placement import Placement

RELAYS_FROM = 4  # copies
MIN_TOKENS = 1024  # that a replica gets in the binary search
FIRST_TRIES = 3


@dataclass(frozen=True)
class Domain:
    """One NVLink domain: its ranks and their experts, counted from 0 inside it.

    Attributes:
        load: tokens of every expert.
        home: rank of every expert.
        ranks: how many.
        spare: slots a rank.
    """

    load: list[int]
    home: list[int]
    ranks: int
    spare: int

    @property
    def loads(self) -> list[int]:
        """Tokens of every rank, experts at home."""
        total = [0] * self.ranks
        for tokens, rank in zip(self.load, self.home, strict=True):
            total[rank] += tokens
        return total


class UltraEPPolicy(PlacementPolicy):
    """Replicas for every micro-batch, from exact counts."""

    def __init__(self, spare: int = 2, shared_buffers: bool = True, gradient_bytes: int = 4) -> None:
        """Set the policy up for one layer.

        Args:
            spare: slots a GPU beyond its own experts.
            shared_buffers: whether layers share them.
            gradient_bytes: of a parameter.

        Raises:
            ValueError: no slot, or another number of bytes.
        """
        check_spare(spare)
        self.spare = spare
        self.copies = CopyTerms(shared_buffers, gradient_bytes, relays_from=RELAYS_FROM)

    def rebalance(self, pairs_GE: Tensor, placement: Placement, context: StepContext) -> Placement | None:
        """Replicas of every domain's hot experts."""
        hierarchy = context.cluster.hierarchy
        ranks, lanes = hierarchy.num_ranks, hierarchy.lanes(domain_level(hierarchy))
        home_E, share_GER = placement.rank_of(ranks), all_at_home(pairs_GE, placement)
        load_E = pairs_GE.sum(0)
        for first in range(0, ranks, lanes):
            experts = (home_E // lanes == first // lanes).nonzero().view(-1)
            domain = Domain(load_E[experts].tolist(), (home_E[experts] - first).tolist(), lanes, self.spare)
            for number, quota in replicas(domain).items():
                expert = int(experts[number])
                amount_R = torch.zeros(ranks, dtype=torch.int64)
                amount_R[[first + rank for rank in quota]] = torch.tensor(list(quota.values()))
                amount_R[home_E[expert]] = load_E[expert] - amount_R.sum()
                share_GER[:, expert] = split_sources(pairs_GE[:, expert], amount_R)
        return with_guests(share_GER, placement, self.spare)


def replicas(domain: Domain) -> dict[int, dict[int, int]]:
    """Tokens of an expert that each of its replicas takes, at the smallest threshold that is found.

    First 1.01 times the mean, then that raised by one and two per cent of the largest load, with replicas that share a
    rank's excess evenly; else a binary search up to the largest load, with replicas of at least 1024 tokens.
    """
    loads = domain.loads
    mean, most = sum(loads) / domain.ranks, max(loads)
    for attempt in range(FIRST_TRIES):
        found = cut_to(domain, int(1.01 * mean + attempt * 0.01 * most), None)
        if found is not None:
            return found
    low, high, best = int(mean), most, dict[int, dict[int, int]]()
    while low < high:
        middle = (low + high) // 2
        found = cut_to(domain, middle, MIN_TOKENS)
        if found is None:
            low = middle + 1
        else:
            high, best = middle, found
    return best


def cut_to(domain: Domain, threshold: int, floor: int | None) -> dict[int, dict[int, int]] | None:
    """Replicas that leave no rank more than ``threshold`` tokens; None if that fails.

    Args:
        domain: what to balance.
        threshold: t.
        floor: tokens that a replica takes at least, unless fewer end its rank's excess; None: a rank's excess over
            the number of ranks that can take some.
    """
    loads = domain.loads
    slack = [max(threshold - tokens, 0) for tokens in loads]
    if sum(max(tokens - threshold, 0) for tokens in loads) > sum(slack):
        return None
    free, found = [domain.spare] * domain.ranks, dict[int, dict[int, int]]()
    for giver in sorted(range(domain.ranks), key=lambda rank: -loads[rank]):
        need = loads[giver] - threshold
        if need <= 0:
            break
        open_ranks = sum(1 for rank in range(domain.ranks) if slack[rank] > 0 and free[rank])
        least = floor if floor is not None else -(-need // max(open_ranks, 1))
        mine = [expert for expert, rank in enumerate(domain.home) if rank == giver]
        for expert in sorted(mine, key=lambda expert: -domain.load[expert]):
            left = domain.load[expert] - 1  # one token stays at home
            taken = found.get(expert, {})
            while need > 0:
                able = [rank for rank in range(domain.ranks) if free[rank] and rank != giver and rank not in taken]
                target = max(able, key=lambda rank: slack[rank], default=None)
                if target is None:
                    break
                quota = min(need, slack[target], left)
                if quota <= 0 or quota < min(least, need):
                    break
                taken[target] = quota
                found[expert] = taken
                free[target] -= 1
                slack[target] -= quota
                need, left = need - quota, left - quota
            if need <= 0:
                break
        if need > 0:
            return None
    return found


def split_sources(count_G: Tensor, amount_R: Tensor) -> Tensor:
    """Which source uses which copy: int64 [G, R].

    Every copy takes the tokens of its own GPU, as many as it may. What a source has left is shared in proportion to
    what the copies still take, by largest remainders, source by source, so that every copy gets its amount.

    Args:
        count_G: int64 [G], an expert's tokens of each source.
        amount_R: int64 [R], tokens that each copy takes; as many in all.
    """
    own_G = torch.minimum(count_G, amount_R)
    share_GR, open_R = torch.diag(own_G), amount_R - own_G
    left_G = count_G - own_G
    for source in left_G.nonzero().view(-1).tolist():
        left, room = int(left_G[source]), int(open_R.sum())
        part_R = left * open_R // room
        remainder_R = left * open_R - part_R * room
        more = left - int(part_R.sum())
        part_R[torch.argsort(remainder_R, descending=True, stable=True)[:more]] += 1
        share_GR[source] += part_R
        open_R = open_R - part_R
    return share_GR
