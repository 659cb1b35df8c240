"""SmartMoE's packing by token counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.smartmoe import SmartMoEPolicy, largest_load, pack
from hiermoe.model import RowBytes
from hiermoe.planner.scheme import hierarchical
from hiermoe.policies.protocol import PlacementUpdate, StepContext
from hiermoe.topology.cluster import Cluster, Level
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import AlphaBeta
from hiermoe.topology.placement import Placement
from tests.planner.cases import examples

NO_SOURCE = torch.empty(0, dtype=torch.int64)  # these policies merge the tokens of all sources


def flat_cluster(num_ranks: int) -> Cluster:
    return Cluster(
        name="flat", description="", world=AlphaBeta(alpha_ms=0, beta_ms_per_byte=0, source="none"),
        levels=(Level(name="gpu", groups=num_ranks, link_gb_per_s=1.0),),
    )  # fmt: skip


def context(iteration: int, num_ranks: int = 2) -> StepContext:
    return StepContext(
        iteration, flat_cluster(num_ranks), hierarchical(1, False, Hierarchy((num_ranks,))), RowBytes.alike(1), 1
    )


def tokens_for(load_E: list[int]) -> torch.Tensor:
    """Expert ids with these counts: int64 [N, 1]."""
    return torch.arange(len(load_E)).repeat_interleave(torch.tensor(load_E))[:, None]


def decide_once(policy: SmartMoEPolicy, load_E: list[int], placement: Placement, num_ranks: int = 2):
    measured = policy.measure(tokens_for(load_E), NO_SOURCE, placement, Hierarchy((num_ranks,)), 0)
    return policy.decide(measured, placement, context(policy.interval - 1, num_ranks))


def test_small_example_by_hand() -> None:
    """5 goes to GPU 0; 4 to GPU 1; 3 to GPU 1 too (4 < 5), now full; 2 to GPU 0: 7 and 7, not 9 and 5."""
    load_E = torch.tensor([5, 4, 3, 2])
    packed = pack(load_E, Placement.identity(4), 2)
    assert packed.rank_of(2).tolist() == [0, 1, 1, 0]
    assert packed.slot_E.tolist() == [0, 3, 2, 1]  # 0 and 2 keep GPU and slot, 1 and 3 take what the other left
    assert largest_load(load_E, Placement.identity(4), 2) == 9
    assert largest_load(load_E, packed, 2) == 7
    update = decide_once(SmartMoEPolicy(interval=1), [5, 4, 3, 2], Placement.identity(4))
    assert update is not None and update.modelled_gain_ms is None
    assert torch.equal(update.placement.slot_E, packed.slot_E)


def test_a_full_gpu_gets_no_more_however_little_it_has() -> None:
    """20, 10, 1, 1 on 2 x 2: GPU 0 takes 20; 10, 1 go to GPU 1, full; the last 1 must go to GPU 0."""
    assert pack(torch.tensor([20, 10, 1, 1]), Placement.identity(4), 2).rank_of(2).tolist() == [0, 1, 1, 0]


@given(
    ranks=st.integers(1, 8), per_rank=st.integers(1, 5), seed=st.integers(0, 10**6), most=st.sampled_from([1, 3, 1000])
)
@examples(100)
def test_packing_is_a_permutation_with_a_full_house_on_every_gpu(
    ranks: int, per_rank: int, seed: int, most: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = ranks * per_rank
    load_E = torch.randint(0, most + 1, (experts,), generator=generator)
    placement = Placement.of_slots(torch.randperm(experts, generator=generator))
    packed = pack(load_E, placement, ranks)
    assert sorted(packed.slot_E.tolist()) == list(range(experts))
    assert torch.bincount(packed.rank_of(ranks), minlength=ranks).tolist() == [per_rank] * ranks
    stays = packed.rank_of(ranks) == placement.rank_of(ranks)
    assert torch.equal(packed.slot_E[stays], placement.slot_E[stays])

    loads = [0] * ranks  # the greedy rule, replayed: nobody with a free slot had less when an expert came
    free = [per_rank] * ranks
    present, chosen = placement.rank_of(ranks).tolist(), packed.rank_of(ranks).tolist()
    for expert in sorted(range(experts), key=lambda e: (-int(load_E[e]), e)):
        open_gpus = [gpu for gpu in range(ranks) if free[gpu]]
        least = min(loads[gpu] for gpu in open_gpus)
        tied = [gpu for gpu in open_gpus if loads[gpu] == least]
        assert chosen[expert] == (present[expert] if present[expert] in tied else tied[0])
        loads[chosen[expert]] += int(load_E[expert])
        free[chosen[expert]] -= 1
    assert largest_load(load_E, packed, ranks) == max(loads)


@given(seed=st.integers(0, 10**6), ranks=st.sampled_from([2, 4]), most=st.sampled_from([2, 50]))
@examples(60)
def test_adopted_exactly_where_the_largest_load_falls(seed: int, ranks: int, most: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    load_E = torch.randint(0, most, (3 * ranks,), generator=generator)
    placement = Placement.of_slots(torch.randperm(3 * ranks, generator=generator))
    packed = pack(load_E, placement, ranks)
    update = decide_once(SmartMoEPolicy(interval=1), load_E.tolist(), placement, ranks)
    lowers = largest_load(load_E, packed, ranks) < largest_load(load_E, placement, ranks)
    assert (update is not None) == lowers
    if update is not None:
        assert torch.equal(update.placement.slot_E, packed.slot_E)


def test_equal_loads_stay_where_they_are() -> None:
    placement = Placement.of_slots(torch.randperm(12, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(pack(torch.full((12,), 7), placement, 4).slot_E, placement.slot_E)
    assert decide_once(SmartMoEPolicy(interval=1), [7] * 12, placement, 4) is None


def test_a_repack_that_only_ties_is_not_adopted() -> None:
    """GPU 0 has 5 and 1, GPU 1 has 3 and 3: packing 5, 3, 3, 1 gives 6 and 6 too."""
    assert decide_once(SmartMoEPolicy(interval=1), [5, 1, 3, 3], Placement.identity(4)) is None


def test_acts_every_tenth_iteration_on_the_sum_of_the_ten() -> None:
    policy, placement = SmartMoEPolicy(), Placement.identity(4)
    assert policy.interval == 10
    hierarchy = Hierarchy((2,))
    acts: dict[int, PlacementUpdate] = {}
    for iteration in range(20):
        # In the first interval all ten together are even; in the second the last iteration alone would be, too.
        even = iteration == 19
        load_E = [3, 3, 3, 3] if even else [5, 5, 0, 0] if iteration % 2 or iteration >= 10 else [0, 0, 5, 5]
        update = policy.decide(
            policy.measure(tokens_for(load_E), NO_SOURCE, placement, hierarchy, iteration),
            placement,
            context(iteration),
        )
        if update is not None:
            acts[iteration] = update
    assert list(acts) == [19]
    assert acts[19].placement.rank_of(2).tolist() == [
        0,
        1,
        1,
        0,
    ]  # 48, 48, 3, 3: the first 3 stays, the second fills up


def test_resuming_in_the_middle_of_an_interval_decides_as_if_never_stopped() -> None:
    placement, hierarchy = Placement.identity(4), Hierarchy((2,))
    loads = [[9, 8, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1]]  # the last two alone would change nothing

    def run(policy: SmartMoEPolicy, iterations: range) -> list[PlacementUpdate | None]:
        measured = [policy.measure(tokens_for(loads[i]), NO_SOURCE, placement, hierarchy, i) for i in iterations]
        return [policy.decide(m, placement, context(i)) for m, i in zip(measured, iterations, strict=True)]

    stopped, resumed = SmartMoEPolicy(interval=4), SmartMoEPolicy(interval=4)
    run(stopped, range(2))
    resumed.load_state_dict(stopped.state_dict())
    *_, straight = run(SmartMoEPolicy(interval=4), range(4))
    *_, after_stop = run(resumed, range(2, 4))
    assert straight is not None and after_stop is not None
    assert torch.equal(after_stop.placement.slot_E, straight.placement.slot_E)
    assert run(SmartMoEPolicy(interval=4), range(2, 4)) == [None, None]
    assert resumed.state_dict() == {}
    with pytest.raises(ValueError, match="remembers sum_E, the state has alone"):
        resumed.load_state_dict({"alone": torch.zeros(1)})


def test_measure_counts_logical_experts_whatever_the_placement() -> None:
    placement = Placement.of_slots(torch.tensor([3, 2, 1, 0]))
    ids_NK = torch.tensor([[0, 1], [0, 2]])
    measured = SmartMoEPolicy().measure(ids_NK, NO_SOURCE, placement, Hierarchy((2,)), 0)
    assert measured is not None and measured.tolist() == [2, 1, 1, 0]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="interval=0 must be at least 1"):
        SmartMoEPolicy(interval=0)
    with pytest.raises(ValueError, match="num_experts=6 is not divisible by ep_size=4"):
        pack(torch.ones(6), Placement.identity(6), 4)
