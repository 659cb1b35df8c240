"""The search as a policy: when it acts, how much it moves, and that ranks agree."""

import pytest
import torch

from hiermoe.model import RowBytes
from hiermoe.planner.scheme import hierarchical
from hiermoe.planner.token_sets import TokenSets
from hiermoe.policies.protocol import PlacementPolicy, PlacementUpdate, StepContext
from hiermoe.policies.search.objective import Objective, needed_by_step
from hiermoe.policies.search.search_policy import SearchPolicy
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.policies.search.conftest import planted

NO_SOURCE = torch.empty(0, dtype=torch.int64)  # these policies merge the tokens of all sources

EXPERTS, TOKENS, ROW_BYTES = 64, 1024, 4096
THREE_STAGES = hierarchical(3, True, Hierarchy((4, 8, 16, 32)))


def routing(iteration: int, seed: int = 7) -> torch.Tensor:
    """Another 1024 tokens of the same hidden groups in every iteration."""
    ids_NK, _ = planted(EXPERTS, 4, 6, TOKENS * 40, seed)
    return ids_NK[iteration * TOKENS : (iteration + 1) * TOKENS]


def walk(
    policy: PlacementPolicy, cluster: Cluster, iterations: range, placement: Placement, ranks: int = 1
) -> tuple[Placement, list[PlacementUpdate | None]]:
    """As training would: measure on each rank, sum, decide, move."""
    updates: list[PlacementUpdate | None] = []
    for iteration in iterations:
        parts = [
            policy.measure(routing(iteration)[rank::ranks], NO_SOURCE, placement, cluster.hierarchy, iteration)
            for rank in range(ranks)
        ]
        summed = None if parts[0] is None else torch.stack([p for p in parts if p is not None]).sum(0).int()
        context = StepContext(iteration, cluster, THREE_STAGES, RowBytes.alike(ROW_BYTES), 1)
        updates.append(policy.decide(summed, placement, context))
        if updates[-1] is not None:
            placement = updates[-1].placement
    return placement, updates


def moved(before: Placement, after: Placement) -> int:
    return int((before.rank_of(32) != after.rank_of(32)).sum())


def held_out_nodes(cluster: Cluster, placement: Placement, seed: int = 7) -> float:
    """Nodes that a token needs which no policy has seen."""
    sets = TokenSets.of(routing(39, seed), EXPERTS)
    return float(needed_by_step(sets, placement, cluster.hierarchy)[0].sum()) / TOKENS


def offline(**changes: int) -> SearchPolicy:
    return SearchPolicy(**({"first_search": 4, "window": 3, "steps": 60, "cells": 1024} | changes))


def online(**changes: int) -> SearchPolicy:
    return SearchPolicy(
        **({"first_search": 2, "interval": 20, "window": 4, "max_moved": 6, "steps": 60, "cells": 1024} | changes)
    )


def test_offline_moves_once_and_then_neither_measures_nor_moves(a6000: Cluster) -> None:
    policy, start = offline(), Placement.identity(EXPERTS)
    assert policy.measure(routing(0), NO_SOURCE, start, a6000.hierarchy, 0) is None  # no search will see it
    end, updates = walk(policy, a6000, range(8), start)
    assert [update is not None for update in updates] == [False] * 3 + [True] + [False] * 4
    assert policy.measure(routing(5), NO_SOURCE, end, a6000.hierarchy, 5) is None
    assert held_out_nodes(a6000, start) > 3 and held_out_nodes(a6000, end) == 1
    update = updates[3]
    assert update is not None and update.modelled_gain_ms is not None
    objective, unseen = Objective(a6000, (THREE_STAGES,), RowBytes.alike(ROW_BYTES)), TokenSets.of(routing(39), EXPERTS)
    saved_ms = objective.step_ms(unseen, start) - objective.step_ms(unseen, end)
    assert update.modelled_gain_ms == pytest.approx(saved_ms, rel=0.2)


def test_ranks_that_sum_their_sketches_decide_like_one_that_sees_all(a6000: Cluster) -> None:
    together, _ = walk(offline(), a6000, range(4), Placement.identity(EXPERTS))
    apart, _ = walk(offline(), a6000, range(4), Placement.identity(EXPERTS), ranks=8)
    assert torch.equal(together.slot_E, apart.slot_E) and not together.is_identity


def test_online_moves_at_most_so_many_experts_and_arrives_at_what_offline_finds(a6000: Cluster) -> None:
    placement, policy = Placement.identity(EXPERTS), online()
    steps = []
    for iteration in range(18):
        after, _ = walk(policy, a6000, range(iteration, iteration + 1), placement)
        steps.append(moved(placement, after))
        placement = after
    assert max(steps) <= 6 and steps[0] == 0 and steps[1] > 0
    assert steps[-1] == 0  # arrived
    assert held_out_nodes(a6000, placement) == 1


@pytest.mark.slow
def test_online_follows_routing_that_changes(a6000: Cluster) -> None:
    policy, placement = online(interval=4, max_moved=64), Placement.identity(EXPERTS)
    placement, _ = walk(policy, a6000, range(2), placement)
    for iteration in range(2, 12):
        summed = policy.measure(routing(iteration, seed=9), NO_SOURCE, placement, a6000.hierarchy, iteration)
        context = StepContext(iteration, a6000, THREE_STAGES, RowBytes.alike(ROW_BYTES), 1)
        update = policy.decide(summed, placement, context)
        placement = update.placement if update else placement
    assert held_out_nodes(a6000, placement, seed=9) == 1


def test_a_resumed_policy_goes_on_as_if_nothing_had_happened(a6000: Cluster) -> None:
    start = Placement.identity(EXPERTS)
    for make, stop in ((offline, 3), (online, 4)):
        whole, resumed = make(), make()
        middle, _ = walk(whole, a6000, range(stop), start)
        resumed.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
        ends = [walk(policy, a6000, range(stop, stop + 4), middle)[0] for policy in (whole, resumed)]
        assert torch.equal(ends[0].slot_E, ends[1].slot_E) and not torch.equal(ends[0].slot_E, middle.slot_E)


def test_the_state_of_another_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="the state has sum_E"):
        offline().load_state_dict({"sum_E": torch.zeros(4)})


def test_nothing_moves_where_experts_sit_well_already(a6000: Cluster) -> None:
    together = torch.arange(EXPERTS).view(32, 2).repeat(32, 1)
    policy, start = offline(first_search=1, window=1), Placement.identity(EXPERTS)
    context = StepContext(0, a6000, THREE_STAGES, RowBytes.alike(ROW_BYTES), 1)
    assert policy.decide(policy.measure(together, NO_SOURCE, start, a6000.hierarchy, 0), start, context) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first_search": 0}, "all must be at least 1"),
        ({"interval": 0}, "all must be at least 1"),
        ({"max_moved": 1}, "experts move in pairs"),
        ({"cells": 100}, "power of two"),
    ],
)
def test_limits_that_make_no_sense_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchPolicy(**arguments)
