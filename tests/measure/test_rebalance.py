"""Policies that know a micro-batch's counts before it is dispatched: what they return holds for it alone."""

import pandas as pd
import pytest
import torch
from torch import Tensor

from hiermoe.measure.plan_cost import planning_cost
from hiermoe.measure.predict import simulate
from hiermoe.measure.workload import Workload, open_workload
from hiermoe.planner.counts import count_routing
from hiermoe.policies.protocol import CopyTerms, PlacementPolicy, PlacementUpdate, StepContext
from hiermoe.topology.placement import Placement
from tests.conftest import Composer
from tests.planner.cases import random_copies, with_quotas


class Guests(PlacementPolicy):
    """Random copies and quotas in every second iteration, and a swap after the first."""

    copies = CopyTerms(shared_buffers=True, gradient_bytes=4)

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.homes: list[Placement] = []

    def rebalance(self, pairs_GE: Tensor, placement: Placement, context: StepContext) -> Placement | None:
        self.seen.append(pairs_GE)
        self.homes.append(placement)
        return copies_of(context.iteration, len(pairs_GE)) if context.iteration % 2 == 0 else None

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        return PlacementUpdate(placement.swapped(0, 127), None) if context.iteration == 0 else None


def copies_of(iteration: int, ranks: int = 32) -> Placement:
    generator = torch.Generator().manual_seed(iteration)
    return with_quotas(random_copies(128, 160, ranks, generator), 5, generator)


def walked(composed: Composer, *overrides: str) -> tuple[Workload, Guests, pd.DataFrame]:
    workload, policy = open_workload(composed("iterations=4", "system=hd2", *overrides)), Guests()
    object.__setattr__(workload, "new_policy", lambda: policy)
    return workload, policy, simulate(workload)


def test_what_a_policy_returns_holds_for_that_micro_batch_alone(composed: Composer) -> None:
    workload, policy, records = walked(composed)
    steps = records[records["phase"] == "step"].set_index("iteration")
    home, hierarchy = Placement.identity(128), workload.cluster.hierarchy
    for iteration in range(4):
        step = workload.routing.step(iteration)
        assert policy.homes[iteration].key == home.key
        chosen = zip(step.source_N.tolist(), step.expert_ids_NK.tolist(), strict=True)
        naive = torch.zeros(32, 128, dtype=torch.int64)
        for source, experts in chosen:
            for expert in experts:
                naive[source, expert] += 1
        assert torch.equal(policy.seen[iteration], naive)
        placement = home if iteration % 2 else copies_of(iteration)
        counts = count_routing(step, placement, hierarchy)
        assert steps["expert_rows_max"][iteration] == counts.pairs_GG.sum(0).max()
        home = Placement.identity(128).swapped(0, 127)
    assert steps["moved_experts"].tolist() == [2, 0, 0, 0]
    assert steps["realised_gain_ms"].notna().tolist() == [True, False, False, False]


def test_copies_cost_where_there_are_any_and_stay_out_of_the_predicted_time(composed: Composer) -> None:
    _, _, records = walked(composed)
    steps = records[records["phase"] == "step"].set_index("iteration")
    costs = ["copies_bytes", "copies_link_ms", "copies_alltoall_ms"]
    costs += ["gradient_bytes", "gradient_link_ms", "gradient_alltoall_ms", "slots_gb"]
    assert (steps.loc[[0, 2], costs] > 0).all(axis=None) and (steps.loc[[1, 3], costs] == 0).all(axis=None)
    stages = records[records["phase"] == "dispatch"].groupby("iteration")["predicted_ms"].sum()
    assert steps["predicted_ms"].tolist() == pytest.approx((4 * stages).tolist())
    net_ms = steps["predicted_ms"] + steps["copies_link_ms"] + steps["gradient_link_ms"]
    assert steps["net_ms"].tolist() == net_ms.tolist()


def test_every_group_has_copies_of_its_own(composed: Composer) -> None:
    _, policy, records = walked(composed, "world_size=32", "max_ep_size=16")
    assert len(policy.seen) == 8 and not torch.equal(policy.seen[0], policy.seen[1])
    assert policy.seen[0].shape == (16, 128)
    assert len(records[records["phase"] == "step"]) == 4


def test_planning_time_of_a_micro_batch_is_measured_apart(composed: Composer) -> None:
    workload = open_workload(composed("iterations=3", "system=hd2", "measure=plan_cost"))
    object.__setattr__(workload, "new_policy", Guests)
    records = planning_cost(workload)
    assert records["stage"].tolist() == ["measure", "decide", "rebalance"] * 3
    assert (records["planning_ms"] >= 0).all()
