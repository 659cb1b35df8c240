"""Offline search for a placement: partitions and kicks as starts, exact swaps from each, the best one kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import torch
from torch import Tensor

from hiermoe.model import RowBytes
from hiermoe.planner.maxima import MaxFunction
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.planner.token_sets import TokenSets
from hiermoe.policies.search.align import aligned
from hiermoe.policies.search.descent import Budget, SwapTable, descend
from hiermoe.policies.search.objective import Objective
from hiermoe.policies.search.seeds import partition_experts
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.placement import Placement

BUDGET_S = 5.0
SWAPPED_SETS = 32768  # that swaps are chosen from
JUDGED_SETS = 65536  # that local optima are compared on
PARTITIONED_SETS = 4096  # of which the hypergraph is made
PARTITION_S = 2.0  # no partition is started with less time left, since none can be interrupted
KICK = 4  # random swaps that lead out of a local optimum
MAXIMUM = MaxFunction("smooth", 10.0)  # as HierD-ES; sharper ones fit imbalances that do not last


@dataclass(frozen=True)
class SearchProgress:
    """The best placement after some time.

    Attributes:
        seconds: since the start.
        steps: evaluations of Q.
        modelled_ms: four AlltoAlls of a mean step.
        origin: where its descent started: ``present``, ``pairs``, ``sets`` or ``kick``.
    """

    seconds: float
    steps: int
    modelled_ms: float
    origin: str


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        placement: the best one; the start itself where nothing beats it. Its groups have the names that move the fewest
            experts from the start.
        modelled_ms: four AlltoAlls of a mean step under it, on the tokens that the search has seen.
        start_ms: the same under the start.
        seconds: taken.
        steps: evaluations of Q, each of all swaps of two experts.
        progress: every improvement, the start first.
    """

    placement: Placement
    modelled_ms: float
    start_ms: float
    seconds: float
    steps: int
    progress: tuple[SearchProgress, ...]


def search_placement(
    expert_ids_NK: Tensor,
    num_experts: int,
    cluster: Cluster,
    row_bytes: int,
    schemes: Sequence[DispatchScheme],
    *,
    step_N: Tensor | None = None,
    start: Placement | None = None,
    budget_s: float | None = BUDGET_S,
    steps: int | None = None,
    seed: int = 0,
) -> SearchResult:
    """Search for the placement of one layer's experts with the smallest modelled AlltoAll time.

    One thread, in main memory; time grows with the sample and not with the trace. Judge the result on tokens that the
    search has not seen: what it says of its own is too good.

    Args:
        expert_ids_NK: integer [N, K], logical experts of tokens, in any order.
        num_experts: E, divisible by the cluster's GPUs.
        cluster: hierarchy, alpha and beta.
        row_bytes: M * v.
        schemes: candidates that deduplicate; the cheapest is taken in every step.
        step_N: integer [N], training step of each token, so that the busiest GPU of every step is priced. None: all
            are of one step, whose size then is N.
        start: where experts sit now; None for expert e in slot e.
        budget_s: seconds of search; None for no limit.
        steps: evaluations of Q; None for no limit. With this limit alone a result is the same every time.
        seed: of samples, partitions and kicks.

    Returns:
        The best placement found and its modelled times.

    Raises:
        ValueError: no tokens, experts out of range, E not divisible by G, a scheme that does not deduplicate, no limit,
            or Mt-KaHyPar is not installed.
    """
    sets = TokenSets.of(expert_ids_NK, num_experts, step_N)
    return search(
        sets, Objective(cluster, tuple(schemes), RowBytes.alike(row_bytes)), Budget(budget_s, steps), seed, start
    )


def search(
    sets: TokenSets, objective: Objective, budget: Budget, seed: int = 0, start: Placement | None = None
) -> SearchResult:
    """As :func:`search_placement`, of expert sets that are there already."""
    generator = torch.Generator().manual_seed(seed)
    hierarchy = objective.cluster.hierarchy
    start = start or Placement.identity(sets.num_experts)
    judged = sets.sample(JUDGED_SETS, generator)
    swapped = sets.sample(SWAPPED_SETS, generator).pooled()
    best = SwapTable(swapped, start, objective.cluster)
    table = best.copy()
    best_ms = objective.step_ms(judged, start)
    progress = [SearchProgress(budget.seconds, 0, best_ms, "present")]
    for origin in chain(("present", "pairs", "sets"), repeat("kick")):
        if origin in ("pairs", "sets") and budget.seconds_left < PARTITION_S:
            continue
        if origin == "pairs":
            table = SwapTable(swapped, partition_experts(sets, hierarchy, "pairs", seed), objective.cluster)
        elif origin == "sets":
            few = sets.sample(PARTITIONED_SETS, generator)
            table = SwapTable(swapped, partition_experts(few, hierarchy, "sets", seed), objective.cluster)
        elif origin == "kick":
            table = kicked(best, generator)
        descend(table, objective.cheapest(swapped, table.placement), objective.row_bytes, MAXIMUM, budget)
        found_ms = objective.step_ms(judged, table.placement)
        if found_ms < best_ms * (1 - 1e-9):
            best, best_ms = table, found_ms
            progress.append(SearchProgress(budget.seconds, budget.steps, best_ms, origin))
        if budget.is_spent or hierarchy.num_ranks == 1:
            break
    placement = aligned(best.placement, start, hierarchy)
    return SearchResult(placement, best_ms, progress[0].modelled_ms, budget.seconds, budget.steps, tuple(progress))


def kicked(table: SwapTable, generator: torch.Generator) -> SwapTable:
    """Another table, some random pairs of experts on different GPUs exchanged."""
    other, slots_2P = table.copy(), table.statistics.pairs.slots_2P
    for pair in torch.randint(slots_2P.shape[1], (KICK,), generator=generator).tolist():
        other.swap(*slots_2P[:, pair].tolist())
    return other
