"""How fast planning is, as ratios: ``pytest tests/benchmarks --benchmark-only``.

32 ranks, K = 8, D = 4, uniform routing over a shuffled placement, on one torch thread. Every benchmark also times a
plainer way to the same result in the same run; its extra_info holds the ratio. That the results agree is asserted here,
once per case; that they are right is the business of tests/planner.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import process_time

import pytest
import torch
import yaml
from torch import Tensor

from baselines.megatron import alltoall
from baselines.tutel_2dh import two_dimensional
from hiermoe.model import RowBytes
from hiermoe.planner.cost import choose_scheme
from hiermoe.planner.counts import count_routing
from hiermoe.planner.maxima import MaxFunction
from hiermoe.planner.scheme import DispatchScheme, every_dimension, hierarchical
from hiermoe.planner.traffic import exact_traffic
from hiermoe.policies.hierd_es import HierDESPolicy
from hiermoe.policies.protocol import StepContext
from hiermoe.policies.swap import SwapStatistics, SwapTimes, measure_swaps, swap_times
from hiermoe.routing.step import RoutingStep, make_step
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.placement import Placement
from tests.benchmarks.conftest import Measure

RANKS, TOPK, ROW_BYTES = 32, 8, 4096
MAXIMUM = MaxFunction("smooth", 10.0)
CLUSTER = Cluster.model_validate(
    yaml.safe_load((Path(__file__).parents[2] / "conf" / "cluster" / "a6000_4x8.yaml").read_text())
)
HIERARCHY = CLUSTER.hierarchy
SCHEME, THREE_STAGES = hierarchical(4, True, HIERARCHY), hierarchical(3, True, HIERARCHY)
SAMPLE = 8  # swaps that the brute force really makes

pytestmark = pytest.mark.benchmark(timer=process_time)


@dataclass(frozen=True)
class Workload:
    """One step and where experts sit."""

    step: RoutingStep
    placement: Placement

    @property
    def num_experts(self) -> int:
        return self.step.num_experts


@lru_cache(maxsize=2)
def workload(num_experts: int, tokens_per_rank: int) -> Workload:
    generator = torch.Generator().manual_seed(num_experts + tokens_per_rank)
    ids = torch.rand(RANKS, tokens_per_rank, num_experts, generator=generator).topk(TOPK, dim=-1).indices
    step = make_step(ids, torch.full((RANKS,), tokens_per_rank), num_experts)
    return Workload(step, Placement.of_slots(torch.randperm(num_experts, generator=generator)))


def all_swaps(work: Workload) -> SwapTimes:
    summed = measure_swaps(work.step.expert_ids_NK, work.placement, HIERARCHY)
    stats = SwapStatistics.unpack(summed, work.num_experts, HIERARCHY)
    return swap_times(stats, SCHEME, CLUSTER, RowBytes.alike(ROW_BYTES), MAXIMUM)


def time_after_swap(work: Workload, r: int, c: int, scheme: DispatchScheme = SCHEME) -> float:
    """Swap two slots, recount all tokens, evaluate the stage formulas."""
    expert_at = work.placement.expert_at_S
    placement = work.placement.swapped(int(expert_at[r]), int(expert_at[c]))
    counts = count_routing(work.step, placement, HIERARCHY)
    time_ms = 0.0
    for stage in scheme.stages:
        level, constants = stage.level(HIERARCHY), CLUSTER.constants(stage.peers)
        share_U = counts.tokens[level - 1].sum(0).double() / HIERARCHY.lanes(level)
        time_ms += constants.alpha_ms + constants.beta_ms_per_byte * ROW_BYTES * float(MAXIMUM(share_U))
    return time_ms


def sampled_swaps(num_experts: int) -> list[tuple[int, int]]:
    pairs_P2 = torch.combinations(torch.arange(num_experts))
    chosen = torch.randperm(len(pairs_P2), generator=torch.Generator().manual_seed(0))[:SAMPLE]
    return [(r, c) for r, c in pairs_P2[chosen].tolist()]


def check_times(
    times: SwapTimes, work: Workload, swaps: list[tuple[int, int]], scheme: DispatchScheme = SCHEME
) -> None:
    """Against the brute force."""
    listed = [(r, c) for r, c in times.slots_2P.T.tolist()]
    per_gpu = work.num_experts // RANKS
    for r, c in swaps:
        after_ms = times.now_ms if r // per_gpu == c // per_gpu else float(times.after_ms_P[listed.index((r, c))])
        assert after_ms == pytest.approx(time_after_swap(work, r, c, scheme), rel=1e-9)


def dense_algorithm_one(work: Workload) -> int:
    """Algorithm 1 from one token x group mask a level; group counts by source, then who receives what."""
    ids_NK = work.placement.slot_E[work.step.expert_ids_NK]
    source_N, times = work.step.source_N, []
    for dimension in range(1, HIERARCHY.depth + 1):
        total = 0.0
        for stage in hierarchical(dimension, True, HIERARCHY).stages:
            level = stage.level(HIERARCHY)
            groups, lanes = HIERARCHY.U[level], HIERARCHY.lanes(level)
            mask_NU = torch.zeros(len(ids_NK), groups, dtype=torch.int64)
            mask_NU.scatter_(1, ids_NK // (work.num_experts // groups), 1)
            tokens_GU = torch.zeros(RANKS, groups, dtype=torch.int64).index_add_(0, source_N, mask_NU)
            busiest = int(tokens_GU.view(groups, lanes, groups).sum(0).max())
            constants = CLUSTER.constants(stage.peers)
            total += constants.alpha_ms + constants.beta_ms_per_byte * ROW_BYTES * busiest
        times.append(total)
    return times.index(min(times)) + 1


def algorithm_one(work: Workload) -> int:
    counts = count_routing(work.step, work.placement, HIERARCHY)
    return choose_scheme(every_dimension(HIERARCHY), counts, CLUSTER, RowBytes.alike(ROW_BYTES)).scheme.dimension


def all_schemes() -> list[DispatchScheme]:
    return [
        *alltoall(HIERARCHY),
        *(hierarchical(d, dedup, HIERARCHY) for dedup in (False, True) for d in range(1, HIERARCHY.depth + 1)),
        *(s for first in (True, False) for cf in (None, 0.0, 1.0) for s in two_dimensional(HIERARCHY, first, cf)),
    ]


def measure_q(
    measure: Measure, num_experts: int, tokens_per_rank: int, grows_with: tuple[str, str, int] | None
) -> None:
    work = workload(num_experts, tokens_per_rank)
    swaps, swaps_in_all = sampled_swaps(num_experts), num_experts * (num_experts - 1) // 2
    check_times(all_swaps(work), work, swaps[:2])
    measure(
        f"Q matrix, E={num_experts} T={tokens_per_rank}",
        lambda: all_swaps(work),
        "recount after every swap *",
        lambda: [time_after_swap(work, r, c) for r, c in swaps],
        times=swaps_in_all / SAMPLE,
        note=f"reference extrapolated from {SAMPLE} of {swaps_in_all} swaps",
        grows_with=grows_with,
    )


@pytest.mark.parametrize("num_experts", [128, 256])
def test_q_matrix(measure: Measure, num_experts: int) -> None:
    measure_q(measure, num_experts, 1024, None)


@dataclass(frozen=True)
class OneRank:
    """What a rank plans from: its own tokens, and the sums of all ranks. Three stages, as Algorithm 1 chooses here."""

    work: Workload

    @property
    def mine_NK(self) -> Tensor:
        return self.work.step.expert_ids_NK[self.work.step.source_N == 0]

    def measure(self, expert_ids_NK: Tensor) -> Tensor:
        measured = HierDESPolicy().measure(expert_ids_NK, self.work.step.source_N, self.work.placement, HIERARCHY, 0)
        assert measured is not None
        return measured

    def decide(self, summed: Tensor) -> None:
        update = HierDESPolicy().decide(
            summed,
            self.work.placement,
            StepContext(0, CLUSTER, THREE_STAGES, RowBytes.alike(ROW_BYTES), expert_parameters=1),
        )
        assert update is not None


@pytest.mark.parametrize("num_experts", [128, 256])
def test_planning_of_one_rank(measure: Measure, num_experts: int) -> None:
    """Measure and decide together, against swapping, recounting and pricing every pair."""
    rank = OneRank(workload(num_experts, 1024))
    swaps, swaps_in_all = sampled_swaps(num_experts), num_experts * (num_experts - 1) // 2
    mine_NK, summed = rank.mine_NK, rank.measure(rank.work.step.expert_ids_NK)
    stats = SwapStatistics.unpack(summed, num_experts, HIERARCHY)
    times = swap_times(stats, THREE_STAGES, CLUSTER, RowBytes.alike(ROW_BYTES), MAXIMUM)
    check_times(times, rank.work, swaps[:2], THREE_STAGES)
    measure(
        f"plan on one rank: measure + decide, HD3, E={num_experts} T=1024",
        lambda: (rank.measure(mine_NK), rank.decide(summed)),
        "recount after every swap *",
        lambda: [time_after_swap(rank.work, r, c, THREE_STAGES) for r, c in swaps],
        times=swaps_in_all / SAMPLE,
        note=f"reference extrapolated from {SAMPLE} of {swaps_in_all} swaps",
        rounds=50,
    )


@pytest.mark.parametrize("num_experts", [128, 256])
def test_measure_of_one_rank(measure: Measure, num_experts: int) -> None:
    rank = OneRank(workload(num_experts, 1024))
    mine_NK = rank.mine_NK
    measure(
        f"measure on one rank, E={num_experts} N=1024",
        lambda: rank.measure(mine_NK),
        "the tokens of all 32 ranks",
        lambda: rank.measure(rank.work.step.expert_ids_NK),
        rounds=20,
    )


@pytest.mark.parametrize("num_experts", [128, 256])
def test_decision_from_summed_measures(measure: Measure, num_experts: int) -> None:
    rank = OneRank(workload(num_experts, 1024))
    summed = rank.measure(rank.work.step.expert_ids_NK)
    measure(
        f"decide from sums, HD3, E={num_experts}",
        lambda: rank.decide(summed),
        "measure of all tokens",
        lambda: rank.measure(rank.work.step.expert_ids_NK),
        rounds=20,
    )


@pytest.mark.parametrize("num_experts", [128, 256])
def test_algorithm_one(measure: Measure, num_experts: int) -> None:
    work = workload(num_experts, 1024)
    assert algorithm_one(work) == dense_algorithm_one(work)
    measure(
        f"Algorithm 1, E={num_experts} T=1024",
        lambda: algorithm_one(work),
        "dense token x group masks",
        lambda: dense_algorithm_one(work),
        rounds=10,
    )


@pytest.mark.parametrize("num_experts", [128, 256])
def test_traffic_of_all_schemes(measure: Measure, num_experts: int) -> None:
    work, schemes = workload(num_experts, 1024), all_schemes()
    counts = count_routing(work.step, work.placement, HIERARCHY)
    measure(
        f"traffic of {len(schemes)} schemes, E={num_experts}",
        lambda: [exact_traffic(scheme, counts, HIERARCHY) for scheme in schemes],
        "counting the step once",
        lambda: count_routing(work.step, work.placement, HIERARCHY),
        rounds=20,
    )


@pytest.mark.parametrize("tokens_per_rank", [256, 512, 1024, 2048, 4096])
def test_q_matrix_grows_with_tokens(measure: Measure, tokens_per_rank: int) -> None:
    measure_q(measure, 128, tokens_per_rank, ("Q matrix", "T", tokens_per_rank))


@pytest.mark.parametrize("num_experts", [64, 128, 256, 512])
def test_q_matrix_grows_with_experts(measure: Measure, num_experts: int) -> None:
    measure_q(measure, num_experts, 1024, ("Q matrix", "E", num_experts))


@pytest.mark.parametrize("tokens_per_rank", [256, 512, 1024, 2048, 4096])
def test_algorithm_one_grows_with_tokens(measure: Measure, tokens_per_rank: int) -> None:
    work = workload(128, tokens_per_rank)
    measure(
        f"Algorithm 1, E=128 T={tokens_per_rank}",
        lambda: algorithm_one(work),
        "dense token x group masks",
        lambda: dense_algorithm_one(work),
        grows_with=("Algorithm 1", "T", tokens_per_rank),
    )


@pytest.mark.parametrize("num_experts", [64, 128, 256, 512])
def test_algorithm_one_grows_with_experts(measure: Measure, num_experts: int) -> None:
    work = workload(num_experts, 1024)
    measure(
        f"Algorithm 1, E={num_experts} T=1024",
        lambda: algorithm_one(work),
        "dense token x group masks",
        lambda: dense_algorithm_one(work),
        grows_with=("Algorithm 1", "E", num_experts),
    )
