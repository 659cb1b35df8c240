"""LAER-MoE's layouts, and the model that chooses among them, against plain loops."""

import heapq
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.choices_of_copies import evenly_among_nearest
from baselines.laer import LAERPolicy, copies_of, greedy_layout
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.baselines.counted import context, random_pairs
from tests.planner.cases import examples


def numbers(load: list[int], slots: int, ranks: int, nodes: int) -> list[int]:
    """A heap of the experts that can still grow."""
    copies = [nodes if len(load) * nodes <= slots else 1] * len(load)
    heap = [(-n / copies[e], e) for e, n in enumerate(load)]
    heapq.heapify(heap)
    while heap and sum(copies) < slots:
        _, expert = heapq.heappop(heap)
        more = nodes if copies[expert] >= nodes else 1
        if sum(copies) + more <= slots and copies[expert] + more <= ranks:
            copies[expert] += more
            heapq.heappush(heap, (-load[expert] / copies[expert], expert))
    while sum(copies) < slots:
        open_ones = [e for e in range(len(load)) if copies[e] < ranks] or range(len(load))
        copies[min(open_ones, key=lambda e: (-load[e] / copies[e], e))] += 1
    return copies


def reference(load: list[int], slots: int, ranks: int, nodes: int) -> list[int]:
    copies, placed = numbers(load, slots, ranks, nodes), list[tuple[int, int]]()  # expert, rank
    for _, expert in sorted((-load[e] / copies[e], e) for e in range(len(load))):
        for _ in range(copies[expert]):
            room = [rank for rank in range(ranks) if sum(at == rank for _, at in placed) < slots // ranks]
            room = [rank for rank in room if (expert, rank) not in placed] or room

            def order(rank: int, expert: int = expert) -> tuple[int, float, int]:
                node = rank * nodes // ranks
                there = sum(e == expert and at * nodes // ranks == node for e, at in placed)
                total = 0.0
                for e, at in placed:
                    total += load[e] / copies[e] if at == rank else 0.0
                return there, total, rank

            placed.append((expert, min(room, key=order)))
    return [expert for rank in range(ranks) for expert, at in placed if at == rank]


@given(
    nodes=st.integers(1, 3), per_node=st.integers(1, 3), per_rank=st.integers(1, 3), spare=st.integers(0, 4),
    most=st.sampled_from([1, 5, 1000]), seed=st.integers(0, 10**6),
)  # fmt: skip
@examples(120)
def test_layout_equals_the_reference(
    nodes: int, per_node: int, per_rank: int, spare: int, most: int, seed: int
) -> None:
    ranks = nodes * per_node
    experts, slots = ranks * per_rank, ranks * (per_rank + spare)
    load = torch.randint(0, most + 1, (experts,), generator=torch.Generator().manual_seed(seed)).tolist()
    assert copies_of(load, slots, ranks, nodes) == numbers(load, slots, ranks, nodes)
    found = greedy_layout(load, slots, ranks, nodes)
    assert found == reference(load, slots, ranks, nodes)
    assert len(found) == slots and min(Counter(found).values()) >= 1 and set(found) == set(range(experts))


def test_copies_start_at_one_a_node_where_that_fits() -> None:
    assert copies_of([1, 1, 1, 1], slots=8, ranks=4, nodes=2) == [2, 2, 2, 2]
    assert copies_of([9, 1, 1, 1], slots=6, ranks=4, nodes=2) == [2, 2, 1, 1]  # 9 would take two more at once
    assert copies_of([9, 1, 1, 1], slots=7, ranks=4, nodes=2) == [4, 1, 1, 1]


@given(seed=st.integers(0, 10**6), spare=st.integers(0, 2))
@examples(25)
def test_model_is_four_times_all_traffic_and_three_times_the_busiest_gpu(seed: int, spare: int) -> None:
    hierarchy, generator = Hierarchy((2, 4, 8), ("node", "half", "gpu")), torch.Generator().manual_seed(seed)
    pairs_GE, slots = random_pairs(8, 16, 50, seed), 8 * (2 + spare)
    more = torch.randint(16, (slots - 16,), generator=generator)
    layout = torch.cat([torch.arange(16), more])[torch.randperm(slots, generator=generator)].tolist()
    comm_ms, busy = 0.0, [0.0] * 8
    for source in range(8):
        for expert in range(16):
            at = [slot * 8 // slots for slot, e in enumerate(layout) if e == expert]
            at = [rank for rank in at if rank // 4 == source // 4] or at
            for rank in at:
                tokens = int(pairs_GE[source, expert]) / len(at)
                busy[rank] += tokens
                if rank != source:
                    comm_ms += tokens * 4096 / ((216 if rank // 4 == source // 4 else 89) * 1e6)
    compute_ms = max(busy) * 2 * 10**6 / 1e11
    placement = evenly_among_nearest(torch.tensor(layout), hierarchy, 1)
    found = LAERPolicy().modelled_ms(pairs_GE, placement, context(hierarchy))
    assert found == pytest.approx(4 * comm_ms + 3 * compute_ms)


def test_decides_in_every_iteration_from_the_sum_of_the_last_five() -> None:
    hierarchy, home = Hierarchy((2, 4), ("node", "gpu")), Placement.identity(8)
    counts = [random_pairs(4, 8, 100, seed) for seed in range(7)]
    policy, resumed, seen = LAERPolicy(spare=1), LAERPolicy(spare=1), list[torch.Tensor]()
    cheapest = policy.modelled_ms
    policy.modelled_ms = lambda pairs_GE, *rest: (seen.append(pairs_GE), cheapest(pairs_GE, *rest))[1]  # type: ignore[method-assign]
    update = None
    for iteration, counted in enumerate(counts):
        if iteration == 6:
            resumed.load_state_dict(policy.state_dict())
        update = policy.decide(counted, home, context(hierarchy, iteration))
        assert update is not None
        assert torch.equal(seen[-1], torch.stack(counts[max(iteration - 4, 0) : iteration + 1]).sum(0))
    assert len(seen) == 7 * 6  # greedy, uniform, and two perturbations of each
    again = resumed.decide(counts[6], home, context(hierarchy, 6))
    assert update is not None and again is not None and update.placement.key == again.placement.key
    assert policy.decide(counts[6] * 0, update.placement, context(hierarchy, 6)) is not update
    with pytest.raises(ValueError, match="LAERPolicy remembers last"):
        policy.load_state_dict({"sum_E": counts[0]})


def test_measures_every_source_alone() -> None:
    ids_NK, source_N = torch.tensor([[0, 1], [0, 3], [2, 3]]), torch.tensor([0, 0, 1])
    measured = LAERPolicy().measure(ids_NK, source_N, Placement.identity(4), Hierarchy((2,)), 0)
    assert measured is not None and measured.tolist() == [[2, 1, 0, 1], [0, 0, 1, 1]]


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"window": 0}, {"tflops": 0.0}, {"across_gb_per_s": -1.0}):
        with pytest.raises(ValueError, match=r"window=\S+ must be at least 1, and .* positive"):
            LAERPolicy(**wrong)  # type: ignore[arg-type]
