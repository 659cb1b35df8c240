"""EPLB: its own worked example to the slot, a reference with heaps, and the nearest copies."""

import heapq

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.choices_of_copies import evenly_among_nearest
from baselines.eplb import EPLBPolicy, balanced
from hiermoe.planner.counts import count_routing
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.baselines.counted import context
from tests.planner.cases import examples, hierarchies, random_step

WEIGHTS = (  # the README's: 12 experts of two layers
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
)
LAYOUTS = (
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
)


@pytest.mark.parametrize("layer", [0, 1])
def test_worked_example_of_its_readme_to_the_slot(layer: int) -> None:
    assert balanced(WEIGHTS[layer], slots=16, groups=4, nodes=2, gpus=8) == LAYOUTS[layer]


def by_heap(weights: list[float], packs: int) -> list[list[int]]:
    """Items to packs: a heap of the packs that still have room."""
    if len(weights) == packs:
        return [[i] for i in range(packs)]
    members: dict[int, list[int]] = {pack: [] for pack in range(packs)}
    heap = [(0.0, pack) for pack in range(packs)]
    for _, item in sorted((-weight, item) for item, weight in enumerate(weights)):
        weight, pack = heapq.heappop(heap)
        members[pack].append(item)
        if len(members[pack]) < len(weights) // packs:
            heapq.heappush(heap, (weight + weights[item], pack))
    return list(members.values())


def reference(load: list[int], slots: int, groups: int, nodes: int, gpus: int) -> list[int]:
    size = len(load) // groups
    blocks = [list(range(first, first + size)) for first in range(0, len(load), size)]
    layout = []
    for of_node in by_heap([float(sum(load[e] for e in block)) for block in blocks], nodes):
        experts = [e for block in of_node for e in blocks[block]]
        items = list(enumerate(experts))  # each copy as (place of the expert in the node, expert)
        heap = [(-load[e] / 1, place, 1) for place, e in items]
        heapq.heapify(heap)
        while len(items) < slots // nodes:
            _, place, copies = heapq.heappop(heap)
            items.append((place, experts[place]))
            heapq.heappush(heap, (-load[experts[place]] / (copies + 1), place, copies + 1))
        weights = [load[e] / items.count((place, e)) for place, e in items]
        layout += [items[i][1] for pack in by_heap(weights, gpus // nodes) for i in pack]
    return layout


@given(
    nodes=st.integers(1, 3), per_node=st.integers(1, 4), groups=st.integers(1, 2), size=st.integers(1, 4),
    spare=st.integers(0, 4), most=st.sampled_from([1, 5, 1000]), seed=st.integers(0, 10**6),
)  # fmt: skip
@examples(150)
def test_layout_equals_the_reference(
    nodes: int, per_node: int, groups: int, size: int, spare: int, most: int, seed: int
) -> None:
    gpus, experts = nodes * per_node, nodes * groups * size
    slots = gpus * (-(-experts // gpus) + spare)
    load = torch.randint(0, most + 1, (experts,), generator=torch.Generator().manual_seed(seed)).tolist()
    sizes = (slots, nodes * groups, nodes, gpus)
    found = balanced(load, *sizes)
    assert found == reference(load, *sizes) and set(found) == set(range(experts))
    where = {e: {slot * nodes // slots for slot, other in enumerate(found) if other == e} for e in range(experts)}
    assert all(len(at) == 1 for at in where.values())  # copies stay in their expert's node


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="groups=5 does not divide 12"):
        balanced(WEIGHTS[0], 16, 5, 1, 8)
    with pytest.raises(ValueError, match="gpus=8 does not divide 15"):
        balanced(WEIGHTS[0], 15, 1, 1, 8)


@given(hierarchy=hierarchies(), spare=st.integers(0, 3), near=st.booleans(), seed=st.integers(0, 10**6))
@examples(50)
def test_sources_split_evenly_among_the_nearest_copies(hierarchy: Hierarchy, spare: int, near: bool, seed: int) -> None:
    ranks, generator = hierarchy.num_ranks, torch.Generator().manual_seed(seed)
    experts, slots = 2 * ranks, (2 + spare) * ranks
    more = torch.randint(experts, (slots - experts,), generator=generator)
    layout = torch.cat([torch.arange(experts), more])[torch.randperm(slots, generator=generator)]
    level = 1 if near else None
    placement = evenly_among_nearest(layout, hierarchy, level)
    step = random_step([12] * ranks, experts, 2, generator, skew=1.0)
    pairs = count_routing(step, placement, hierarchy).pairs_GS.tolist()

    def shared(one: int, other: int) -> int:
        levels = range(1, hierarchy.depth + 1) if level is None else [level]
        return sum(one // hierarchy.lanes(i) == other // hierarchy.lanes(i) for i in levels)

    for source in range(ranks):
        for expert in range(experts):
            slots_of = [slot for slot, e in enumerate(layout.tolist()) if e == expert]
            best = max(shared(source, slot * ranks // slots) for slot in slots_of)
            nearest = [slot for slot in slots_of if shared(source, slot * ranks // slots) == best]
            used = [pairs[source][slot] for slot in nearest]
            assert sum(used) == sum(pairs[source][slot] for slot in slots_of)
            assert max(used) - min(used) <= 1


def test_acts_at_the_end_of_an_interval_on_its_sum_and_remembers_it() -> None:
    hierarchy, home = Hierarchy((2, 4)), Placement.identity(8)
    ids_NK = torch.tensor([[0], [0], [0], [5]])
    one, other = EPLBPolicy(spare=1, interval=2), EPLBPolicy(spare=1, interval=2)
    source_N = torch.zeros(4, dtype=torch.int64)
    summed = one.measure(ids_NK, source_N, home, hierarchy, 0)
    assert summed is not None and summed.tolist() == [3, 0, 0, 0, 0, 1, 0, 0]
    assert one.decide(summed, home, context(hierarchy, 0)) is None
    other.load_state_dict(one.state_dict())
    updates = [policy.decide(summed.flip(0), home, context(hierarchy, 1)) for policy in (one, other)]
    wanted = balanced([3, 0, 1, 0, 0, 1, 0, 3], 12, 1, 1, 4)
    for update in updates:
        assert update is not None and update.placement.expert_at_S.tolist() == wanted
    assert one.state_dict() == {}
    again = one.measure(ids_NK, source_N, updates[0].placement, hierarchy, 2)  # type: ignore[union-attr]
    assert again is not None and torch.equal(again, summed)
    with pytest.raises(ValueError, match="EPLBPolicy remembers sum_E"):
        one.load_state_dict({"other": summed})


def test_hierarchical_keeps_a_gpus_experts_together_on_a_node() -> None:
    hierarchy, home = Hierarchy((2, 4), ("node", "gpu")), Placement.identity(8)
    policy = EPLBPolicy(spare=1, interval=1, hierarchical=True)
    load = torch.tensor([9, 8, 7, 6, 1, 1, 1, 1])
    update = policy.decide(load, home, context(hierarchy))
    assert update is not None
    assert update.placement.expert_at_S.tolist() == balanced(load.tolist(), 12, 4, 2, 4)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="interval=0 must be at least 1"):
        EPLBPolicy(interval=0)
    with pytest.raises(ValueError, match="spare=0 must be at least 1"):
        EPLBPolicy(spare=0)
