"""What all planners of a micro-batch have in common: every token once, quotas as counted, slots and domains kept."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.echo import EchoPolicy
from baselines.echo_sinkhorn import EchoSinkhornPolicy
from baselines.fastermoe import FasterMoEPolicy
from baselines.guests import cut_in_ranges, domain_level, with_guests
from baselines.llep import LLEPPolicy
from baselines.moonep import MoonEPPolicy
from baselines.ultraep import UltraEPPolicy
from hiermoe.planner.counts import count_routing
from hiermoe.policies.protocol import PlacementPolicy
from hiermoe.topology.hierarchy import Hierarchy
from tests.baselines.counted import context, guests, random_home, random_pairs, shares
from tests.planner.cases import examples, hierarchies, random_step

SPARE = 2
PLANNERS: dict[str, Callable[[], PlacementPolicy]] = {
    "ultraep": lambda: UltraEPPolicy(SPARE),
    "llep": lambda: LLEPPolicy(SPARE, min_tokens=3),
    "llep_any": lambda: LLEPPolicy(None, min_tokens=3),
    "fastermoe": lambda: FasterMoEPolicy(SPARE, tflops=1e-3),
    "echo": lambda: EchoPolicy(SPARE),
    "echo_sinkhorn": lambda: EchoSinkhornPolicy(SPARE),
    "moonep": MoonEPPolicy,
}


@pytest.mark.parametrize("name", PLANNERS)
@given(
    hierarchy=hierarchies(), per_rank=st.integers(1, 4), most=st.sampled_from([1, 40, 20_000]), seed=st.integers(0, 999)
)
@examples(40)
def test_quotas_sum_to_counts_and_slots_are_respected(
    name: str, hierarchy: Hierarchy, per_rank: int, most: int, seed: int
) -> None:
    ranks = hierarchy.num_ranks
    pairs_GE, home = random_pairs(ranks, ranks * per_rank, most, seed), random_home(ranks, per_rank, seed)
    placement = PLANNERS[name]().rebalance(pairs_GE, home, context(hierarchy))
    found = shares(placement, pairs_GE, home)
    assert all(tokens > 0 for tokens in found.values())
    summed = torch.zeros_like(pairs_GE)
    for (source, expert, _), tokens in found.items():
        summed[source, expert] += tokens
    assert torch.equal(summed, pairs_GE)
    here = guests(found, home, ranks)
    if name != "llep_any":
        assert max(map(len, here.values())) <= (per_rank if name == "moonep" else SPARE)
    if placement is not None:
        own = placement.expert_at_S.view(ranks, -1)[:, :per_rank]
        assert torch.equal(own.reshape(-1), home.expert_at_S)
        spare = placement.num_slots // ranks - per_rank
        assert spare == {"llep_any": max(map(len, here.values())), "moonep": per_rank}.get(name, SPARE)
    if name == "ultraep":
        lanes, rank_E = hierarchy.lanes(domain_level(hierarchy)), home.rank_of(ranks).tolist()
        assert all(rank // lanes == rank_E[expert] // lanes for _, expert, rank in found)


@pytest.mark.parametrize("name", PLANNERS)
@given(hierarchy=hierarchies(most_ranks=8), seed=st.integers(0, 999))
@examples(15)
def test_every_token_is_counted_once_where_its_quota_says(name: str, hierarchy: Hierarchy, seed: int) -> None:
    ranks = hierarchy.num_ranks
    step = random_step([9] * ranks, 2 * ranks, 2, torch.Generator().manual_seed(seed), skew=2.0)
    home = random_home(ranks, 2, seed)
    placement = PLANNERS[name]().rebalance(step.pairs_GE, home, context(hierarchy))
    if placement is not None:
        counts = count_routing(step, placement, hierarchy)
        assert placement.quota_GS is not None and torch.equal(counts.pairs_GS, placement.quota_GS)


@pytest.mark.parametrize("name", PLANNERS)
def test_same_counts_give_the_same_plan_and_no_tokens_need_none(name: str) -> None:
    hierarchy, home = Hierarchy((2, 8)), random_home(8, 3, 1)
    pairs_GE = random_pairs(8, 24, 5000, 3)
    one, other = (PLANNERS[name]().rebalance(pairs_GE, home, context(hierarchy)) for _ in range(2))
    assert one is None or (other is not None and one.key == other.key)
    nothing = PLANNERS[name]().rebalance(torch.zeros_like(pairs_GE), home, context(hierarchy))
    assert shares(nothing, torch.zeros_like(pairs_GE), home) == {}


def test_domains_are_nodes_else_racks_else_the_outermost_groups() -> None:
    assert domain_level(Hierarchy((2, 4, 8), ("rack", "node", "gpu"))) == 2
    assert domain_level(Hierarchy((2, 4, 8), ("rack", "tray", "gpu"))) == 1
    assert domain_level(Hierarchy((2, 4, 8))) == 1 and domain_level(Hierarchy((8,))) == 0


def test_ranges_are_consecutive_in_the_order_of_sources_and_gpus() -> None:
    cut = cut_in_ranges(torch.tensor([3, 0, 4]), torch.tensor([2, 4, 1]))
    assert cut.tolist() == [[2, 1, 0], [0, 0, 0], [0, 3, 1]]


def test_more_guests_than_slots_are_refused() -> None:
    share_GER = torch.zeros(2, 4, 2, dtype=torch.int64)
    share_GER[0, 2, 0] = share_GER[0, 3, 0] = 1
    with pytest.raises(ValueError, match="a GPU has 2 guests in spare=1 slots"):
        with_guests(share_GER, random_home(2, 2, 0).identity(4), 1)


@pytest.mark.parametrize("policy", [UltraEPPolicy, LLEPPolicy, EchoPolicy, FasterMoEPolicy])
def test_settings_out_of_range_are_refused(policy: Callable[..., PlacementPolicy]) -> None:
    with pytest.raises(ValueError, match="spare=0 must be at least 1"):
        policy(spare=0)
    with pytest.raises(ValueError, match="gradient_bytes=8 must be 2 or 4"):
        policy(gradient_bytes=8)
