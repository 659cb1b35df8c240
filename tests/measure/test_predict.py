"""A prediction walks through routing as training would."""

import pandas as pd
import pytest
import torch

from hiermoe.measure.predict import simulate
from hiermoe.measure.workload import open_routing, open_workload
from hiermoe.planner.cost import choose_scheme, price
from hiermoe.planner.counts import count_routing
from hiermoe.policies.protocol import PlacementPolicy, PlacementUpdate
from hiermoe.records.status import NotApplicable
from hiermoe.runs.run_config import RunConfig
from hiermoe.topology.placement import Placement
from tests.conftest import Composer
from tests.planner import reference
from tests.planner.cases import random_copies


def test_decision_of_an_iteration_acts_from_the_next_one_on(
    composed: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    class Rotate(PlacementPolicy):
        """Moves every expert to the next slot, every iteration."""

        def measure(self, expert_ids_NK, source_N, placement, hierarchy, iteration):
            seen.append(placement.slot_E.tolist())

        def decide(self, summed, placement, context):
            return PlacementUpdate(Placement.of_slots(placement.slot_E.roll(1)), None)

    workload = open_workload(composed("iterations=3"))
    object.__setattr__(workload, "new_policy", Rotate)
    records = simulate(workload)
    identity = torch.arange(128)
    assert seen == [identity.roll(i).tolist() for i in range(3)]
    steps = records[records["phase"] == "step"]
    for iteration, busiest in zip(steps["iteration"], steps["expert_rows_max"], strict=True):
        placement = Placement.of_slots(identity.roll(iteration))
        counts = count_routing(workload.routing.step(iteration), placement, workload.cluster.hierarchy)
        assert counts.pairs_GG.sum(0).max() == busiest


def test_a_run_gives_the_same_whatever_ran_before_it_in_the_same_process(composed: Composer) -> None:
    runs = [
        composed("system=hiermoe", "iterations=6", "routing=stress_hot_rank", *changes)
        for changes in ([], ["system.policy.interval=3"], ["system.policy.gamma=3.0"], ["seed=1"])
    ]

    def alone(config: RunConfig) -> pd.DataFrame:
        open_routing.cache_clear()
        return simulate(open_workload(config))

    expected = [alone(config) for config in runs]
    assert any((frame["moved_experts"] > 0).any() for frame in expected)
    open_routing.cache_clear()
    for order in (1, -1):
        for config, frame in [*zip(runs, expected, strict=True)][::order]:
            pd.testing.assert_frame_equal(simulate(open_workload(config)), frame)


def test_policy_that_makes_copies_is_walked_through_and_its_traffic_is_that_of_every_token(composed: Composer) -> None:
    generator = torch.Generator().manual_seed(0)
    placements = [Placement.identity(128), *(random_copies(128, 128 + 32, 32, generator) for _ in range(2))]

    class Copy(PlacementPolicy):
        """Other copies of experts in every iteration, and other choices among them."""

        def measure(self, expert_ids_NK, source_N, placement, hierarchy, iteration):
            assert torch.bincount(source_N, minlength=32).tolist() == [64] * 32
            return torch.ones(1)

        def decide(self, summed, placement, context):
            return PlacementUpdate(placements[(context.iteration + 1) % 3], None)

    workload = open_workload(composed("iterations=3", "system=hd2"))
    object.__setattr__(workload, "new_policy", Copy)
    records, hierarchy = simulate(workload), workload.cluster.hierarchy
    for iteration, placement in enumerate(placements):
        step = workload.routing.step(iteration)
        if placement.has_copies:
            world, tokens = reference.on_slots(hierarchy, placement, step)
        else:
            world, tokens = reference.machine(hierarchy, placement), reference.tokens_of(step)
        walked = torch.tensor(reference.walk_tokens(world, tokens, 2).rows)
        rows = records.loc[(records["phase"] == "dispatch") & (records["iteration"] == iteration), "rows"]
        assert rows.tolist() == walked.sum(1).amax(1).tolist()
    steps = records[records["phase"] == "step"].set_index("iteration")
    held = [{(slot * 32 // p.num_slots, e) for slot, e in enumerate(p.expert_at_S.tolist())} for p in placements]
    assert steps["moved_experts"].tolist() == [len(held[(i + 1) % 3] - held[i]) for i in range(3)]
    assert steps["realised_gain_ms"].notna().tolist() == [True, True, False]
    assert "<" in steps["moves"][0] and ">" not in steps["moves"][0]


@pytest.mark.parametrize("system", ["hiermoe", "hiermoe_search", "smartmoe"])
def test_policy_that_cannot_handle_copies_says_so(composed: Composer, system: str) -> None:
    workload = open_workload(composed(f"system={system}"))
    copies, step = random_copies(128, 160, 32, torch.Generator().manual_seed(0)), workload.routing.step(0)
    with pytest.raises(NotApplicable, match="gives every expert one slot, but 128 experts have 160 slots"):
        workload.new_policy().measure(step.expert_ids_NK, step.source_N, copies, workload.cluster.hierarchy, 0)


def test_chosen_dimension_is_never_slower_than_a_fixed_one(composed: Composer) -> None:
    def times(system: str) -> list[float]:
        records = simulate(open_workload(composed(f"system={system}")))
        return records.loc[records["phase"] == "step", "predicted_ms"].tolist()

    chosen, fixed = times("hd_moe"), [times(f"hd{d}") for d in (1, 2, 3, 4)]
    assert chosen == [min(step) for step in zip(*fixed, strict=True)]


def test_step_is_four_times_the_sum_of_its_stages(composed: Composer) -> None:
    records = simulate(open_workload(composed("system=hd3")))
    for _, iteration in records.groupby("iteration"):
        stages = iteration.loc[iteration["phase"] == "dispatch", "predicted_ms"]
        step = iteration.loc[iteration["phase"] == "step", "predicted_ms"]
        assert len(stages) == 3
        assert step.item() == pytest.approx(4 * stages.sum(), rel=1e-12)


def test_swaps_lower_the_time_on_a_hot_spot_and_gate_swaps_less(composed: Composer) -> None:
    def run(system: str):
        records = simulate(
            open_workload(
                composed(f"system={system}", "routing=stress_hot_adjacent", "iterations=24", "tokens_per_rank=512")
            )
        )
        return records[records["phase"] == "step"]

    static, swapping, gated = run("hd_moe"), run("hiermoe"), run("hiermoe_gated")
    late = static["counted"]
    assert swapping.loc[late, "predicted_ms"].sum() < 0.95 * static.loc[late, "predicted_ms"].sum()
    assert gated["moved_experts"].sum() <= swapping["moved_experts"].sum()
    assert (swapping["moved_experts"] <= 2).all() and swapping["moved_experts"].sum() > 10


def test_same_configuration_gives_the_same_records(composed: Composer) -> None:
    config = composed("system=hiermoe", "routing=topic")
    assert simulate(open_workload(config)).equals(simulate(open_workload(config)))


def test_gain_of_several_swaps_is_recounted_and_never_below_what_was_modelled(composed: Composer) -> None:
    run = composed("system=hiermoe_multi", "routing=stress_hot_adjacent", "iterations=6", "tokens_per_rank=512")
    records = simulate(open_workload(run))
    steps = records[records["phase"] == "step"]
    several = steps["moved_experts"] > 2
    assert several.any()
    assert (
        steps.loc[several, "recounted_gain_ms"].notna().all() and steps.loc[~several, "recounted_gain_ms"].isna().all()
    )
    slack_ms = steps["recounted_gain_ms"] - steps["modelled_gain_ms"]
    assert (slack_ms[several] >= -1e-9).all()


def test_realised_gain_is_what_the_next_step_would_have_taken_more_without_the_update(composed: Composer) -> None:
    config = composed("system=hiermoe", "routing=stress_hot_adjacent", "iterations=4", "tokens_per_rank=512")
    workload = open_workload(config)
    records = simulate(workload)
    steps = records[records["phase"] == "step"].set_index("iteration")
    assert (steps["moved_experts"] == 2).all() and steps["realised_gain_ms"].isna().tolist() == [False] * 3 + [True]
    placement = Placement.identity(128)
    for iteration in range(3):
        counts = workload.routing.counts(iteration + 1, placement, workload.cluster.hierarchy)
        unmoved = choose_scheme(workload.schemes, counts, workload.cluster, workload.sizes.sent)
        gain = 4 * unmoved.alltoall_ms - float(steps["predicted_ms"][iteration + 1])
        assert steps["realised_gain_ms"][iteration] == pytest.approx(gain, rel=1e-9)
        placement = placement.after(str(steps["moves"][iteration]))


def test_five_levels_are_walked_through(composed: Composer) -> None:
    """Pods, racks, nodes, sockets and GPUs, as a profile scales to; d* is the best of HD1 to HD5."""
    five = ("cluster=cloud_eth100", "world_size=512", "model.num_experts=512", "tokens_per_rank=8", "iterations=2")
    workload = open_workload(composed(*five, "system=hiermoe"))
    hierarchy = workload.cluster.hierarchy
    assert hierarchy.names == ("pod", "rack", "node", "socket", "gpu") and len(workload.schemes) == 5
    records = simulate(workload)
    assert records.loc[records["phase"] == "routing", "stage"].tolist() == list(hierarchy.names) * 2
    first = records[(records["phase"] == "step") & (records["iteration"] == 0)].iloc[0]
    counts = workload.routing.counts(0, Placement.identity(512), hierarchy)
    times = [price(scheme, counts, workload.cluster, workload.sizes.sent).alltoall_ms for scheme in workload.schemes]
    assert first["predicted_ms"] == 4 * min(times) and first["dimension"] == 1 + times.index(min(times))
    assert first["moved_experts"] == 2 and first["modelled_gain_ms"] > 0
