"""MoonEP's plan of every micro-batch (MoonshotAI; its planner read in a public fork), written from a description of it.

Every GPU computes equally many token-expert pairs. Each GPU that lacks some gets them from one other, so it has at
most as many guests as that one has experts, and as many slots are kept for them. The tokens of an expert are cut into
consecutive ranges over GPUs: no locality.
"""

import torch
from torch import Tensor

from baselines.guests import all_at_home, cut_in_ranges, with_guests
from hiermoe.policies.protocol import CopyTerms, PlacementPolicy, StepContext
from hiermoe.topology.placement import Placement


class MoonEPPolicy(PlacementPolicy):
    """Equal loads in every micro-batch; as many slots for guests as a GPU has experts of its own."""

    def __init__(self, shared_buffers: bool = True, gradient_bytes: int = 4) -> None:
        """Set the policy up for one layer.

        Args:
            shared_buffers: whether layers share the slots.
            gradient_bytes: of a parameter.

        Raises:
            ValueError: another number of bytes.
        """
        self.copies = CopyTerms(shared_buffers, gradient_bytes)

    def rebalance(self, pairs_GE: Tensor, placement: Placement, context: StepContext) -> Placement | None:
        """Every GPU with its share of all pairs, to the pair."""
        ranks = len(pairs_GE)
        load_E, home_E = pairs_GE.sum(0), placement.rank_of(ranks)
        load_R = torch.zeros(ranks, dtype=torch.int64).index_add_(0, home_E, load_E)
        amount_ER = torch.zeros(len(load_E), ranks, dtype=torch.int64)
        amount_ER[torch.arange(len(load_E)), home_E] = load_E
        for donor, rooms in donations(load_R.tolist()).items():
            experts = (home_E == donor).nonzero().view(-1)
            for receiver, number, tokens in given(rooms, load_E[experts].tolist()):
                amount_ER[experts[number], receiver] += tokens
                amount_ER[experts[number], donor] -= tokens
        share_GER = all_at_home(pairs_GE, placement)
        at_home_E = amount_ER[torch.arange(len(load_E)), home_E]
        for expert in (at_home_E != load_E).nonzero().view(-1).tolist():
            share_GER[:, expert] = cut_in_ranges(pairs_GE[:, expert], amount_ER[expert])
        return with_guests(share_GER, placement, placement.per_rank(ranks))


def donations(loads: list[int]) -> dict[int, dict[int, int]]:
    """For every donor the pairs that it gives each of its receivers; a GPU with the most left fills the emptiest one.

    Where GPUs cannot all have equally many, the first ones have one more.
    """
    ranks, total = len(loads), sum(loads)
    balance = [tokens - total // ranks - (rank < total % ranks) for rank, tokens in enumerate(loads)]
    rooms: dict[int, dict[int, int]] = {}
    while max(balance) > 0:
        donor, receiver = balance.index(max(balance)), balance.index(min(balance))
        rooms.setdefault(donor, {})[receiver] = -balance[receiver]
        balance[donor] += balance[receiver]  # may lack some itself then
        balance[receiver] = 0
    return rooms


def given(rooms: dict[int, int], left: list[int]) -> list[tuple[int, int, int]]:
    """Which of a donor's experts each receiver gets: receiver, number of the expert, tokens.

    The largest room that is still open takes from the expert with most tokens left.
    """
    rooms, left, moves = dict(rooms), list(left), []
    while any(rooms.values()):
        receiver = max(rooms, key=lambda rank: (rooms[rank], -rank))
        number = left.index(max(left))
        tokens = min(rooms[receiver], left[number])
        moves.append((receiver, number, tokens))
        rooms[receiver] -= tokens
        left[number] -= tokens
    return moves
