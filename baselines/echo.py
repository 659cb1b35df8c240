"""ECHO's one-shot greedy planner (Megatron-LM pull request 2368), written from a description of it.

In every micro-batch a GPU above the mean load spills the tops of its largest experts to GPUs below it. Spills and
rooms, both by falling size, are laid along one line; where two overlap, a clone takes that many tokens. Each GPU
keeps its largest clones.
"""

from collections import defaultdict

import torch
from torch import Tensor

from baselines.guests import all_at_home, check_spare, with_guests
from hiermoe.policies.protocol import CopyTerms, PlacementPolicy, StepContext
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement

Move = tuple[int, int, int]  # expert, GPU, tokens


class EchoPolicy(PlacementPolicy):
    """Clones of every micro-batch's largest experts."""

    def __init__(self, spare: int = 2, shared_buffers: bool = True, gradient_bytes: int = 2) -> None:
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
        self.copies = CopyTerms(shared_buffers, gradient_bytes)

    def rebalance(self, pairs_GE: Tensor, placement: Placement, context: StepContext) -> Placement | None:
        """Clones where spills and rooms overlap."""
        ranks = len(pairs_GE)
        home_E, load_E = placement.rank_of(ranks), pairs_GE.sum(0)
        share_GER = all_at_home(pairs_GE, placement)
        spills, rooms = spills_and_rooms(load_E.tolist(), home_E.tolist(), ranks)
        for expert, rank, tokens in self.clones(spills, rooms, home_E, context.cluster.hierarchy):
            left_G = share_GER[:, expert, home_E[expert]]
            part_G = torch.minimum(tokens * pairs_GE[:, expert] // load_E[expert], left_G)
            spare_G = left_G - part_G  # what is still missing, the first sources fill
            before_G = spare_G.cumsum(0) - spare_G
            part_G += torch.minimum((tokens - part_G.sum() - before_G).clamp(min=0), spare_G)
            share_GER[:, expert, rank] += part_G
            share_GER[:, expert, home_E[expert]] -= part_G
        return with_guests(share_GER, placement, self.spare)

    def clones(
        self, spills: list[tuple[int, int]], rooms: list[tuple[int, int]], home_E: Tensor, hierarchy: Hierarchy
    ) -> list[Move]:
        """Which clones there are and the tokens that they take.

        Args:
            spills: tokens and expert, as :func:`spills_and_rooms` has them.
            rooms: tokens and GPU, likewise.
            home_E: int64 [E], GPU of each expert.
            hierarchy: groups of GPUs.
        """
        return one_line(spills, rooms, self.spare)


def spills_and_rooms(
    load: list[int], home: list[int], ranks: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What GPUs have above the mean, and how much others are below it, both by falling size, then by number.

    Args:
        load: tokens of every expert.
        home: its GPU.
        ranks: G.

    Returns:
        Tokens and expert of every spill; tokens and GPU of every room.
    """
    mean = -(-sum(load) // ranks)
    spills, rooms = list[tuple[int, int]](), list[tuple[int, int]]()
    for rank in range(ranks):
        filled = 0
        for expert in sorted((e for e in range(len(load)) if home[e] == rank), key=lambda e: (load[e], e)):
            spill = max(filled + load[expert] - mean, 0) - max(filled - mean, 0)
            filled += load[expert]
            if spill:
                spills.append((spill, expert))
        if filled < mean:
            rooms.append((mean - filled, rank))
    spills.sort(key=lambda one: (-one[0], one[1]))
    rooms.sort(key=lambda one: (-one[0], one[1]))
    return spills, rooms


def one_line(spills: list[tuple[int, int]], rooms: list[tuple[int, int]], spare: int) -> list[Move]:
    """Clones where spills and rooms overlap that are laid end to end.

    Args:
        spills: tokens and expert.
        rooms: tokens and GPU.
        spare: clones that a GPU may have: its largest.
    """
    moves = defaultdict[int, list[Move]](list)
    i = j = 0
    spill, room = spills[0][0] if spills else 0, rooms[0][0] if rooms else 0
    while i < len(spills) and j < len(rooms):
        tokens = min(spill, room)
        moves[rooms[j][1]].append((spills[i][1], rooms[j][1], tokens))
        spill, room = spill - tokens, room - tokens
        if not spill:
            i += 1
            spill = spills[i][0] if i < len(spills) else 0
        if not room:
            j += 1
            room = rooms[j][0] if j < len(rooms) else 0
    return [move for rank in sorted(moves) for move in sorted(moves[rank], key=lambda move: -move[2])[:spare]]
