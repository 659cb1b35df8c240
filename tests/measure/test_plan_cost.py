"""What a placement policy costs: which tokens are timed, what is summed, and what kind of number it is."""

import pytest

from hiermoe.measure.plan_cost import planning_cost
from hiermoe.measure.workload import open_workload
from hiermoe.policies.protocol import PlacementPolicy
from hiermoe.policies.swap import SwapStatistics, measure_swaps
from hiermoe.records.store import RunStore
from hiermoe.runs.execute import execute
from hiermoe.runs.measurable import source_of
from hiermoe.runs.summary import summary
from hiermoe.topology.placement import Placement
from tests.conftest import Composer

PLANNING = ("measure=plan_cost", "cluster=h100_ib400", "world_size=16", "max_ep_size=16")


def test_rank_counts_its_own_tokens_and_decides_from_those_of_all(composed: Composer) -> None:
    workload = open_workload(composed(*PLANNING, "iterations=3"))
    step, hierarchy = workload.routing.step(0), workload.cluster.hierarchy
    policy = workload.new_policy()
    counted: list[int] = []
    decided: list[int] = []

    class Watched(PlacementPolicy):
        def measure(self, expert_ids_NK, source_N, placement, hierarchy, iteration):
            counted.append(len(expert_ids_NK))
            return policy.measure(expert_ids_NK, source_N, placement, hierarchy, iteration)

        def decide(self, summed, placement, context):
            assert summed is not None
            stats = SwapStatistics.unpack(summed, 128, hierarchy)
            decided.append(int(stats.levels[-1].needed_U.sum()))
            return policy.decide(summed, placement, context)

    object.__setattr__(workload, "new_policy", Watched)
    rows = planning_cost(workload)
    all_tokens = measure_swaps(step.expert_ids_NK, Placement.identity(128), hierarchy)
    needed = int(SwapStatistics.unpack(all_tokens, 128, hierarchy).levels[-1].needed_U.sum())
    assert counted == [16 * 64, 64, 64, 64] and decided == [needed] * 3
    assert rows["stage"].tolist() == ["measure", "decide"] * 3
    assert (rows["planning_ms"] > 0).all() and rows["counted"].tolist() == [False] * 2 + [True] * 4
    assert set(rows["bytes"].dropna()) == {all_tokens.nbytes}


def test_times_are_of_this_machine_and_never_called_simulated(composed: Composer, store: RunStore) -> None:
    config = composed(*PLANNING)
    outcome = execute(config, store)
    assert outcome.status == "ok"
    assert set(store.read(outcome.run_id)["source"]) == {"local"} == {source_of(config)}


def test_summary_has_what_each_part_takes(composed: Composer, store: RunStore) -> None:
    rows = store.read(execute(composed(*PLANNING, "system=hiermoe_copies"), store).run_id)
    parts, values = (list(column.cells) for column in summary(rows, "").columns)
    assert [str(part).partition(",")[0] for part in parts] == ["measure", "decide", "rebalance"]
    decided = rows[rows["counted"] & (rows["stage"] == "decide")]["planning_ms"].median()
    assert values[1] == f"{decided:.2f} ms" and " MB are summed" in str(values[0])


def test_name_of_the_run_depends_on_the_host(composed: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    planning, simulated = composed(*PLANNING), composed(*PLANNING, "measure=predict")
    before = planning.run_id, simulated.run_id
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    assert planning.run_id != before[0] and simulated.run_id == before[1]
