"""Copies for one micro-batch that are worth what their weights and gradients take on the links.

The busiest link decides what copies take, so they are made under a budget of link time that rises step by step. Under
each, as long as links have room, the busiest GPU lends tokens of its largest experts to others that are below the mean.
So copies come first where links are fast, and between nodes last. Every prefix of that sequence is a plan: the one
whose step is shortest is taken, AlltoAlls, links and the busiest GPU's computation together. It may be the empty one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hiermoe.planner.counts import separating_level
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement


@dataclass(frozen=True)
class Copy:
    """Tokens of an expert that another GPU than its home computes.

    Attributes:
        expert: logical.
        rank: the other GPU.
        tokens: how many.
    """

    expert: int
    rank: int
    tokens: int


@dataclass(frozen=True)
class Demand:
    """What a micro-batch asks for, and how its tokens share ways.

    Attributes:
        load_E: int64 [E], tokens of each expert.
        home_E: int64 [E], its GPU.
        rows: for levels 1..D, float64 [U]: tokens that need each group, experts at home.
        leaving: for levels 1..D, float64 [E]: of an expert's tokens, the share whose only expert in its group it is.
        coming: for levels 1..D, float64 [U, E]: of an expert's tokens, the share that needs nothing in the group.
    """

    load_E: np.ndarray
    home_E: np.ndarray
    rows: tuple[np.ndarray, ...]
    leaving: tuple[np.ndarray, ...]
    coming: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Prefixes:
    """After 0, 1, 2, ... copies, n in all.

    Attributes:
        rows_Dn: float64 [D, n + 1], tokens that the busiest group of each level needs.
        link_ms_n: float64 [n + 1], of the busiest link.
        load_n: int64 [n + 1], expert rows of the busiest GPU.
    """

    rows_Dn: np.ndarray
    link_ms_n: np.ndarray
    load_n: np.ndarray


class Links:
    """Which GPUs can still send or get a copy within a budget of time.

    A copy takes its time on the link of every group that it leaves, and of every one that it enters.

    Attributes:
        apart_GG: int64 [G, G], first level that separates two GPUs; D + 1: none.
        busiest_ms: what the copies take so far.
    """

    def __init__(self, hierarchy: Hierarchy, level_ms: Sequence[float]) -> None:
        """Without any copies.

        Args:
            hierarchy: groups of GPUs.
            level_ms: for levels 1..D, what one copy takes on the link of a group.
        """
        self.apart_GG = separating_level(hierarchy).numpy()
        self.busiest_ms = 0.0
        self._hierarchy, self._level_ms, self._budget_ms = hierarchy, level_ms, 0.0
        # Out and in: copies that crossed the edge of each group, and the outermost level that a GPU can still cross.
        self._crossed = [[np.zeros(groups, dtype=np.int64) for groups in hierarchy.groups] for _ in range(2)]
        self._from_2G = np.ones((2, hierarchy.num_ranks), dtype=np.int64)

    def budgets_ms(self, spare: int) -> list[float]:
        """Times of the busiest link from which on one copy more has room, rising."""
        lanes = (self._hierarchy.lanes(level) for level in range(1, self._hierarchy.depth + 1))
        return sorted(
            {n * ms for ms, gpus in zip(self._level_ms, lanes, strict=True) for n in range(1, spare * gpus + 1)}
        )

    def allow(self, budget_ms: float) -> None:
        """From here on no link may be busy for longer, but for rounding."""
        self._budget_ms = budget_ms * (1 + 1e-9)
        self._from_2G[:] = 1
        for level, ms in enumerate(self._level_ms, start=1):
            for end, crossed in enumerate(self._crossed):
                full_U = (crossed[level - 1] + 1) * ms > self._budget_ms
                if full_U.any():
                    self._from_2G[end][np.repeat(full_U, self._hierarchy.lanes(level))] = level + 1

    def reached_from(self, giver: int) -> np.ndarray:
        """GPUs to which one GPU can send a copy: bool [G]."""
        return self.apart_GG[giver] >= np.maximum(self._from_2G[1], self._from_2G[0, giver])

    def send(self, giver: int, target: int) -> None:
        """A copy goes from one GPU to another."""
        for level in range(int(self.apart_GG[giver, target]), self._hierarchy.depth + 1):
            lanes, ms = self._hierarchy.lanes(level), self._level_ms[level - 1]
            for end, rank in enumerate((giver, target)):
                group, crossed_U = rank // lanes, self._crossed[end][level - 1]
                crossed_U[group] += 1
                number = int(crossed_U[group])
                self.busiest_ms = max(self.busiest_ms, number * ms)
                if (number + 1) * ms > self._budget_ms:
                    inside = self._from_2G[end, group * lanes : (group + 1) * lanes]
                    np.maximum(inside, level + 1, out=inside)


def priced_copies(
    demand: Demand,
    hierarchy: Hierarchy,
    level_ms: Sequence[float],
    spare: int,
    step_ms: Callable[[Prefixes], np.ndarray],
) -> list[Copy]:
    """The copies that make a step shortest, the fewest of those.

    Args:
        demand: of the micro-batch.
        hierarchy: groups of GPUs.
        level_ms: for levels 1..D, what one copy's weights and gradients take on the link of a group.
        spare: slots a GPU.
        step_ms: time of a step after every prefix: float64 [n + 1].
    """
    copies, prefixes = copies_in_order(demand, hierarchy, level_ms, spare)
    times_ms = step_ms(prefixes)
    return copies[: int(np.argmax(times_ms <= times_ms.min() * (1 + 1e-9)))]


def copies_in_order(
    demand: Demand, hierarchy: Hierarchy, level_ms: Sequence[float], spare: int
) -> tuple[list[Copy], Prefixes]:
    """All copies that bring the busiest GPU's load down, under budgets that rise, and what each prefix makes of it.

    A copy goes from the busiest GPU, the lowest one on ties: of its largest expert at home that some GPU can take, to
    where most fits, the nearest and then the lowest GPU on ties. Nobody takes or gives beyond the mean, rounded up.
    """
    links, ranks = Links(hierarchy, level_ms), hierarchy.num_ranks
    left_E, rows = demand.load_E.copy(), [row_U.copy() for row_U in demand.rows]
    load_R = np.bincount(demand.home_E, demand.load_E, ranks).astype(np.int64)
    by_home_E = np.argsort(demand.home_E, kind="stable")
    experts = np.split(by_home_E, np.searchsorted(demand.home_E[by_home_E], np.arange(1, ranks)))
    free_R, has_ER = np.full(ranks, spare), demand.home_E[:, None] == np.arange(ranks)
    mean = -(-int(load_R.sum()) // ranks)
    copies, seen = list[Copy](), [(*(row_U.max() for row_U in rows), 0.0, load_R.max())]

    def next_of(giver: int) -> Copy | None:
        room_R = np.minimum(mean - load_R, load_R[giver] - mean)
        room_R[(free_R == 0) | ~links.reached_from(giver)] = 0
        if not (room_R > 0).any():
            return None
        mine = experts[giver]
        for expert in mine[np.argsort(-left_E[mine], kind="stable")].tolist():
            fits_R = np.minimum(room_R, left_E[expert])
            fits_R[has_ER[expert]] = 0
            rank = int(np.argmax(fits_R * (hierarchy.depth + 2) + links.apart_GG[giver] * (fits_R > 0)))
            if fits_R[rank] > 0:
                return Copy(expert, rank, int(fits_R[rank]))
        return None

    for budget_ms in links.budgets_ms(spare):
        links.allow(budget_ms)
        while load_R[giver := int(load_R.argmax())] > mean and (copy := next_of(giver)) is not None:
            copies.append(copy)
            links.send(giver, copy.rank)
            has_ER[copy.expert, copy.rank] = True
            free_R[copy.rank] -= 1
            left_E[copy.expert] -= copy.tokens
            load_R[[giver, copy.rank]] += np.array([-copy.tokens, copy.tokens])
            for level in range(int(links.apart_GG[giver, copy.rank]), hierarchy.depth + 1):
                lanes, row_U = hierarchy.lanes(level), rows[level - 1]
                row_U[giver // lanes] -= copy.tokens * demand.leaving[level - 1][copy.expert]
                row_U[copy.rank // lanes] += copy.tokens * demand.coming[level - 1][copy.rank // lanes, copy.expert]
            seen.append((*(row_U.max() for row_U in rows), links.busiest_ms, load_R.max()))
    table = np.array(seen, dtype=np.float64).T
    return copies, Prefixes(table[:-2], table[-2], table[-1].astype(np.int64))


def with_copies(
    pairs_GE: Tensor, home: Placement, copies: Sequence[Copy], spare: int, hierarchy: Hierarchy
) -> Placement:
    """The placement of a micro-batch: own experts in their order, then copies as they come.

    One copy after the other takes its tokens from the sources nearest to it. A slot without a copy has another one of
    the GPU's first expert, which nobody uses.

    Args:
        pairs_GE: int64 [G, E], tokens of each source for each expert.
        home: one slot for each expert.
        copies: at most ``spare`` on a GPU.
        spare: slots a GPU beyond its own experts.
        hierarchy: says who is near.
    """
    ranks, experts = pairs_GE.shape
    own, apart_GG = home.per_rank(ranks), separating_level(hierarchy).numpy()
    width = own + spare
    own_RS = home.expert_at_S.view(ranks, own)
    at_S = torch.cat([own_RS, own_RS[:, :1].expand(-1, spare)], 1).reshape(-1)
    home_slot_E = home.slot_E // own * width + home.slot_E % own
    left_EG, quota_SG = pairs_GE.numpy().T.copy(), np.zeros((ranks * width, ranks), dtype=np.int64)
    filled = [own] * ranks
    for copy in copies:
        slot = copy.rank * width + filled[copy.rank]
        filled[copy.rank] += 1
        at_S[slot] = copy.expert
        nearest_G = np.argsort(-apart_GG[copy.rank], kind="stable")
        asked_G = left_EG[copy.expert, nearest_G]
        taken_G = np.diff(asked_G.cumsum().clip(max=copy.tokens), prepend=0)
        quota_SG[slot, nearest_G] = taken_G
        left_EG[copy.expert, nearest_G] -= taken_G
    quota_SG[home_slot_E.numpy()] = left_EG
    quota_GS = torch.from_numpy(np.ascontiguousarray(quota_SG.T))
    return Placement(at_S, home_slot_E.expand(ranks, experts).contiguous(), quota_GS)
