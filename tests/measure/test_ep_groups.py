"""Expert-parallel groups with all experts each: the slowest counts, one placement serves all."""

import pandas as pd
import pytest
import torch

from hiermoe.measure.predict import simulate
from hiermoe.measure.workload import CachedRouting, Kept, open_workload
from hiermoe.planner.counts import count_routing
from hiermoe.planner.scheme import DispatchScheme, Stage
from hiermoe.planner.traffic import exact_traffic
from hiermoe.policies.protocol import PlacementPolicy, StepContext
from hiermoe.routing.step import RoutingStep
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import WORLD
from hiermoe.topology.placement import Placement
from hiermoe.topology.scaling import scaled
from tests.conftest import Composer

GROUPED = ("cluster=h100_ib400", "world_size=64", "max_ep_size=16")


def steps(records: pd.DataFrame) -> pd.DataFrame:
    return records[records["phase"] == "step"].reset_index(drop=True)


@pytest.mark.parametrize("system", ["megatron", "hd_moe"])
def test_step_takes_as_long_as_the_slowest_group(system: str, composed: Composer) -> None:
    """The groups of iteration i walk through steps 4i .. 4i + 3, which one group alone walks through one by one."""
    grouped = steps(simulate(open_workload(composed(*GROUPED, f"system={system}", "iterations=3"))))
    alone = composed("cluster=h100_ib400", "world_size=16", f"system={system}", "iterations=12")
    one_by_one = steps(simulate(open_workload(alone)))
    for column, take in (("predicted_ms", lambda x: x.max()), ("pairs", lambda x: x.iloc[0])):
        expected = [take(one_by_one[column].iloc[4 * i : 4 * i + 4]) for i in range(3)]
        assert grouped[column].tolist() == expected


def test_one_group_is_the_world_without_groups(composed: Composer) -> None:
    plain = composed("cluster=h100_ib400", "system=hiermoe", "routing=topic")
    grouped = composed("cluster=h100_ib400", "system=hiermoe", "routing=topic", "world_size=32", "max_ep_size=256")
    assert plain.cluster == grouped.cluster and grouped.ep_groups == 1
    assert simulate(open_workload(plain)).equals(simulate(open_workload(grouped)))


def test_placement_is_decided_from_the_tokens_of_all_groups(composed: Composer, monkeypatch) -> None:
    seen: list[torch.Tensor] = []
    contexts: list[StepContext] = []

    class Watch(PlacementPolicy):
        def measure(self, expert_ids_NK, source_N, placement, hierarchy, iteration):
            return torch.bincount(expert_ids_NK.flatten(), minlength=128)

        def decide(self, summed, placement, context):
            assert summed is not None
            seen.append(summed)
            contexts.append(context)

    workload = open_workload(composed(*GROUPED, "iterations=2"))
    object.__setattr__(workload, "new_policy", Watch)
    simulate(workload)
    for iteration, summed in enumerate(seen):
        parts = [workload.routing.step(iteration, replica).expert_ids_NK for replica in range(4)]
        assert torch.equal(summed, torch.bincount(torch.cat(parts).flatten(), minlength=128))
        assert len({part.numpy().tobytes() for part in parts}) == 4
    assert contexts[0].row_bytes.mean == workload.sizes.row_bytes // 4  # of sums over four groups, Q prices the mean


def test_groups_side_by_side_send_what_each_sends_alone() -> None:
    """Two groups of eight with the same experts, against a world of sixteen whose halves have experts of their own."""
    generator = torch.Generator().manual_seed(0)
    ids_NK = torch.rand(16 * 5, 16, generator=generator).argsort(dim=1)[:, :4]
    world, part = (scaled(Cluster.named("cloud_eth100"), n) for n in (16, 8))
    source_N = torch.arange(16).repeat_interleave(5)
    apart = RoutingStep(ids_NK + 16 * (source_N[:, None] // 8), source_N, 16, 32)
    flat = DispatchScheme("flat", (Stage(WORLD, "token"),))
    whole = exact_traffic(flat, count_routing(apart, Placement.identity(32), world.hierarchy), world.hierarchy)
    assert not whole.rows_SGG[0, :8, 8:].any() and not whole.rows_SGG[0, 8:, :8].any()
    for group in range(2):
        mine = source_N // 8 == group
        step = RoutingStep(ids_NK[mine], source_N[mine] - 8 * group, 8, 16)
        counts = count_routing(step, Placement.identity(16), part.hierarchy)
        own = slice(8 * group, 8 * group + 8)
        assert torch.equal(exact_traffic(flat, counts, part.hierarchy).rows_SGG[0], whole.rows_SGG[0, own, own])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["world_size=64"], "cluster a6000_4x8 has constants of its own for 32 GPUs"),
        (
            ["cluster=h100_ib400", "world_size=64", "max_ep_size=24"],
            "world_size=64 is not divisible into groups of ep_s",
        ),
        (["cluster=h100_ib400", "world_size=256"], "num_experts=128 is smaller than ep_size=256"),
        (["measure=replay", "ranks=local", "max_ep_size=8"], "max_ep_size=8 is for simulation"),
    ],
)
def test_world_that_cannot_be_is_refused(overrides: list[str], message: str, composed: Composer) -> None:
    with pytest.raises(ValueError, match=message):
        open_workload(composed(*overrides))


def test_expert_parallelism_is_bounded_by_experts_and_gpus(composed: Composer) -> None:
    sizes = {}
    for world in (8, 128, 1024):
        config = composed("cluster=h100_ib400", f"world_size={world}", "max_ep_size=256")
        sizes[world] = (config.cluster.hierarchy.num_ranks, config.ep_groups)
    assert sizes == {8: (8, 1), 128: (128, 1), 1024: (128, 8)}  # 128 experts


@pytest.mark.slow
def test_trace_that_is_too_short_for_all_groups_does_not_apply(composed: Composer) -> None:
    long = ("cluster=h100_ib400", "tokens_per_rank=256", "max_ep_size=64")
    assert open_workload(composed(*long, "routing=recorded", "world_size=256")).routing.num_distinct == 3
    with pytest.raises(ValueError, match="lasts for 1 iterations of 8 groups of 64 ranks with 256 tokens"):
        open_workload(composed(*long, "routing=recorded", "world_size=512"))
    assert open_workload(composed(*long, "routing=resampled", "world_size=4096")).routing.ep_groups == 64


def test_kept_values_stay_within_their_budget() -> None:
    made: list[int] = []

    def of(key: int) -> bytes:
        made.append(key)
        return bytes(key)

    kept = Kept[int, bytes](len, budget_bytes=10)
    for key in (4, 5, 4, 6, 4, 5, 20, 20):
        assert len(kept.get(key, lambda key=key: of(key))) == key
    assert made == [4, 5, 6, 5, 20]  # 5 was asked for longest ago when 6 came; 20 is kept though it is too large


def test_counts_are_made_once_for_each_placement(composed: Composer) -> None:
    workload = open_workload(composed("routing=uniform"))
    made: list[int] = []
    step = workload.routing.step(0)

    class Source:
        num_distinct = None

        def step(self, iteration: int) -> RoutingStep:
            made.append(iteration)
            return step

    routing = CachedRouting(Source(), ep_groups=2)
    hierarchy, identity = workload.cluster.hierarchy, Placement.identity(128)
    first = routing.counts(3, identity, hierarchy, 1)
    assert routing.counts(3, Placement.identity(128), hierarchy, 1) is first
    assert routing.counts(3, identity.swapped(0, 64), hierarchy, 1) is not first
    assert made == [7]
