"""ECHO's Sinkhorn planner (LoongForge issue 28), written from a description of it.

Spills and rooms are those of the greedy planner. Sinkhorn's iterations lay a transport plan between them, of which
more goes to GPUs of an expert's own node. Then come as many rounds as a GPU has slots: in each, a GPU takes at most one
clone, the best match first. A match counts the tokens that it can move and those that the transport plan moves.
"""

import numpy as np
from torch import Tensor

from baselines.echo import EchoPolicy, Move
from baselines.guests import domain_level
from hiermoe.planner.counts import separating_level
from hiermoe.topology.hierarchy import Hierarchy

COST_IN_NODE, COST_ACROSS, SOFTNESS, ITERATIONS = 1.0, 3.0, 3.0, 50
WHOLE = 1e-6  # tokens: ranks whose sums are rounded differently still count the same whole tokens


class EchoSinkhornPolicy(EchoPolicy):
    """Clones of every micro-batch's largest experts, near their homes where that moves as much."""

    def clones(
        self, spills: list[tuple[int, int]], rooms: list[tuple[int, int]], home_E: Tensor, hierarchy: Hierarchy
    ) -> list[Move]:
        """The best matches of each round."""
        if not spills:
            return []
        spill_X, expert_X = np.array(spills).T
        room_Y, rank_Y = np.array(rooms).T
        apart_GG = separating_level(hierarchy).numpy()
        in_node_XY = apart_GG[home_E.numpy()[expert_X]][:, rank_Y] > domain_level(hierarchy)
        planned_XY = transport(spill_X, room_Y, np.where(in_node_XY, COST_IN_NODE, COST_ACROSS))
        bonus_XY = 2 * np.floor(planned_XY + WHOLE).astype(np.int64) + in_node_XY  # of equals the own node
        matches = rounds(spill_X, room_Y, bonus_XY, self.spare)
        return [(int(expert_X[x]), int(rank_Y[y]), tokens) for x, y, tokens in matches]


def transport(spill_X: np.ndarray, room_Y: np.ndarray, cost_XY: np.ndarray) -> np.ndarray:
    """Sinkhorn's plan: float64 [X, Y], tokens. Room beyond all spills is filled by nobody's tokens, from across.

    Args:
        spill_X: int64 [X], tokens that have to leave, above 0.
        room_Y: int64 [Y], tokens that have room, above 0, at least as many in all.
        cost_XY: float64 [X, Y], of a token.
    """
    nobodys = room_Y.sum() - spill_X.sum()
    if nobodys:
        spill_X = np.append(spill_X, nobodys)
        cost_XY = np.vstack([cost_XY, np.full(len(room_Y), COST_ACROSS)])
    kernel_XY = np.exp(-cost_XY / SOFTNESS)
    scale_X, scale_Y = np.ones(len(spill_X)), np.ones(len(room_Y))
    for _ in range(ITERATIONS):
        scale_X = spill_X / (kernel_XY @ scale_Y)
        scale_Y = room_Y / (kernel_XY.T @ scale_X)
    plan_XY = scale_X[:, None] * kernel_XY * scale_Y
    return plan_XY[:-1] if nobodys else plan_XY


def rounds(spill_X: np.ndarray, room_Y: np.ndarray, bonus_XY: np.ndarray, number: int) -> list[Move]:
    """Matches, the best of each round first: spill, room, tokens.

    A match is worth twice min(spill, room), of what is left of both, and its bonus. On ties the first spill counts,
    then the first room.

    Args:
        spill_X: int64 [X], tokens.
        room_Y: int64 [Y], tokens.
        bonus_XY: int64 [X, Y], half tokens.
        number: of rounds; in each, a room is matched once at most.
    """
    spill_X, room_Y = spill_X.copy(), room_Y.copy()
    matches = []
    for _ in range(number):
        open_Y = room_Y > 0
        while open_Y.any() and spill_X.any():
            tokens_XY = np.minimum(spill_X[:, None], np.where(open_Y, room_Y, 0))
            best = int(np.where(tokens_XY > 0, 2 * tokens_XY + bonus_XY, -1).argmax())
            x, y = divmod(best, len(room_Y))
            tokens = int(tokens_XY[x, y])
            matches.append((x, y, tokens))
            spill_X[x] -= tokens
            room_Y[y] -= tokens
            open_Y[y] = False
    return matches
