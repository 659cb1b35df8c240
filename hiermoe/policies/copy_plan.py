"""Copies for one micro-batch that are worth what their weights and gradients take on the links.

Time is paid for the busiest link, so copies are made under a budget of link time that rises step by step. Under each,
as long as links have room, the busiest GPU gives tokens of its largest experts to others, each up to the mean. After
every copy the step is priced: AlltoAlls by the groups' rows, links, and the busiest GPU's computation. What was
cheapest on the way is the plan. Copies on links that cost nothing more are made first, those between nodes last, and
only where what they save is more than what they cost.
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
    """Tokens of an expert that another GPU computes.

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
    """What a micro-batch asks for, and how often its tokens meet others on the way.

    Attributes:
        load_E: int64 [E], tokens of each expert.
        home_E: int64 [E], its GPU.
        rows: for levels 1..D, float64 [U]: tokens that need each group, experts at home.
        leaving: for levels 1..D, float64 [E]: of an expert's tokens the share whose only expert in its group it is.
        coming: for levels 1..D, float64 [U, E]: of an expert's tokens the share that needs nothing else in the group.
    """

    load_E: np.ndarray
    home_E: np.ndarray
    rows: tuple[np.ndarray, ...]
    leaving: tuple[np.ndarray, ...]
    coming: tuple[np.ndarray, ...]


class Links:
    """Which GPUs can still send or get a copy within a budget of time.

    A copy takes its time on the link of every group that it leaves and of every one that it enters.
    """

    def __init__(self, hierarchy: Hierarchy, level_ms: Sequence[float]) -> None:
        """Without any copies.

        Args:
            hierarchy: groups of GPUs.
            level_ms: for levels 1..D, what one copy takes on the link of a group.
        """
        self.hierarchy, self.level_ms = hierarchy, level_ms
        self.apart_GG = separating_level(hierarchy).numpy()
        # Of both directions: copies that left or entered each group, and the outermost level on which a GPU may cross.
        self._used = [[np.zeros(groups, dtype=np.int64) for groups in hierarchy.groups] for _ in range(2)]
        self._from_2G = np.ones((2, hierarchy.num_ranks), dtype=np.int64)
        self.busiest_ms = 0.0
        self._budget_ms = float("inf")

    def budgets(self, spare: int) -> list[float]:
        """Times of the busiest link at which more copies become possible, rising."""
        hierarchy = self.hierarchy
        counts = (range(1, spare * hierarchy.lanes(level) + 1) for level in range(1, hierarchy.depth + 1))
        return sorted({n * ms for ms, possible in zip(self.level_ms, counts, strict=True) for n in possible})

    def allow(self, budget_ms: float) -> None:
        """From here on no link may be busy for longer."""
        self._budget_ms = budget_ms * (1 + 1e-9)
        self._from_2G[:] = 1
        for level, ms in enumerate(self.level_ms, start=1):
            for end, used in enumerate(self._used):
                full_U = (used[level - 1] + 1) * ms > self._budget_ms
                self._from_2G[end][np.repeat(full_U, self.hierarchy.lanes(level))] = level + 1

    def able(self, giver: int) -> np.ndarray:
        """GPUs to which one GPU can send a copy: bool [G]."""
        apart_G = self.apart_GG[giver]
        return (apart_G >= self._from_2G[1]) & (apart_G >= self._from_2G[0, giver])

    def send(self, giver: int, target: int) -> None:
        """A copy goes from one GPU to another."""
        for level in range(int(self.apart_GG[giver, target]), self.hierarchy.depth + 1):
            lanes, ms = self.hierarchy.lanes(level), self.level_ms[level - 1]
            for end, rank in enumerate((giver, target)):
                group = rank // lanes
                used_U = self._used[end][level - 1]
                used_U[group] += 1
                self.busiest_ms = max(self.busiest_ms, int(used_U[group]) * ms)
                if (int(used_U[group]) + 1) * ms > self._budget_ms:
                    inside = self._from_2G[end, group * lanes : (group + 1) * lanes]
                    np.maximum(inside, level + 1, out=inside)


def priced_copies(
    demand: Demand, links: Links, spare: int, step_ms: Callable[[Sequence[float], float, float], float]
) -> list[Copy]:
    """The copies that make a step shortest, of those that the busiest GPU makes one after another.

    Args:
        demand: of the micro-batch.
        links: without copies yet.
        spare: slots a GPU.
        step_ms: time of a step from the rows of the busiest group of each level, the busiest link's ms, and the busiest
            GPU's expert rows.
    """
    hierarchy = links.hierarchy
    ranks = hierarchy.num_ranks
    left_E = demand.load_E.copy()
    load_R = np.bincount(demand.home_E, demand.load_E, ranks).astype(np.int64)
    rows = [row_U.copy() for row_U in demand.rows]
    free_R, has_ER = np.full(ranks, spare), demand.home_E[:, None] == np.arange(ranks)
    experts = [np.flatnonzero(demand.home_E == rank) for rank in range(ranks)]
    mean = -(-int(load_R.sum()) // ranks)

    def priced() -> float:
        return step_ms([float(row_U.max()) for row_U in rows], links.busiest_ms, float(load_R.max()))

    def give(giver: int) -> Copy | None:
        """The busiest GPU's next copy: of its largest expert that can go, where most fits, the nearest on ties."""
        need = int(load_R[giver]) - mean
        mine = experts[giver]
        room_R = np.minimum(mean - load_R, need)
        able_R = links.able(giver) & (free_R > 0) & (room_R > 0)
        for expert in mine[np.argsort(-left_E[mine], kind="stable")].tolist():
            if left_E[expert] <= 0:
                return None
            tokens_R = np.where(able_R & ~has_ER[expert], np.minimum(room_R, left_E[expert]), 0)
            rank = int(np.argmax(tokens_R * (hierarchy.depth + 2) + links.apart_GG[giver]))
            if tokens_R[rank] > 0:
                return Copy(expert, rank, int(tokens_R[rank]))
        return None

    def least_ms(link_ms: float) -> float:
        """No plan on so busy a link takes less."""
        even = [min(float(row_U.max()), float(start_U.mean())) for row_U, start_U in zip(rows, demand.rows, strict=True)]
        return step_ms(even, link_ms, mean)

    made: list[Copy] = []
    best, best_ms = 0, priced()
    for budget_ms in links.budgets(spare):
        if load_R.max() <= mean or least_ms(budget_ms) >= best_ms:
            break
        links.allow(budget_ms)
        while (need := int(load_R.max())) > mean:
            giver = int(load_R.argmax())
            copy = give(giver)
            if copy is None:
                break
            made.append(copy)
            links.send(giver, copy.rank)
            has_ER[copy.expert, copy.rank] = True
            free_R[copy.rank] -= 1
            left_E[copy.expert] -= copy.tokens
            load_R[giver] -= copy.tokens
            load_R[copy.rank] += copy.tokens
            for level in range(int(links.apart_GG[giver, copy.rank]), hierarchy.depth + 1):
                lanes, row_U = hierarchy.lanes(level), rows[level - 1]
                row_U[giver // lanes] -= copy.tokens * demand.leaving[level - 1][copy.expert]
                row_U[copy.rank // lanes] += copy.tokens * demand.coming[level - 1][copy.rank // lanes, copy.expert]
            if (ms := priced()) < best_ms * (1 - 1e-9):
                best, best_ms = len(made), ms
    return made[:best]


def with_copies(pairs_GE: Tensor, home: Placement, copies: Sequence[Copy], spare: int, hierarchy: Hierarchy) -> Placement:
    """The placement of a micro-batch: own experts in their order, then copies; the nearest sources use a copy first.

    A slot without a copy has another one of the GPU's first expert, which nobody uses.

    Args:
        pairs_GE: int64 [G, E], tokens of each source for each expert.
        home: one slot for each expert.
        copies: each on a GPU of its own, in the order in which they take their tokens.
        spare: slots a GPU beyond its own experts.
        hierarchy: says who is near.
    """
    ranks, experts = pairs_GE.shape
    own, apart_GG = home.per_rank(ranks), separating_level(hierarchy)
    width = own + spare
    at_RS = torch.cat([home.expert_at_S.view(ranks, own), home.expert_at_S.view(ranks, own)[:, :1].expand(-1, spare)], 1)
    home_slot_E = home.slot_E // own * width + home.slot_E % own
    left_EG = pairs_GE.T.contiguous()
    quota_SG = pairs_GE.new_zeros(ranks * width, ranks)
    filled = [own] * ranks
    for copy in copies:
        slot = copy.rank * width + filled[copy.rank]
        at_RS.view(-1)[slot] = copy.expert
        filled[copy.rank] += 1
        nearest_G = torch.argsort(apart_GG[copy.rank], descending=True, stable=True)
        asked_G = left_EG[copy.expert, nearest_G]
        taken_G = (asked_G.cumsum(0).clamp(max=copy.tokens)).diff(prepend=asked_G.new_zeros(1))
        quota_SG[slot, nearest_G] = taken_G
        left_EG[copy.expert, nearest_G] -= taken_G
    quota_SG[home_slot_E] = left_EG
    copy_GE = home_slot_E.expand(ranks, experts).contiguous()
    return Placement(at_RS.reshape(-1), copy_GE, quota_SG.T.contiguous())
