"""Systems that are measured together do what each does alone, and their records say which moves they made."""

import math
from datetime import timedelta
from typing import Any

import pandas as pd
import pytest

from hiermoe.measure.workload import open_workload
from hiermoe.ranks.places import NewRanks
from hiermoe.ranks.world import Device, Source
from hiermoe.records.store import RunStore
from hiermoe.runs.execute import execute, execute_together
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.conftest import Composer

SMALL = ("measure=replay", "ranks=local", "world_size=8", "narrowed=16", "tokens_per_rank=32", "iterations=6")
SYSTEMS = ("megatron", "hd_moe", "hiermoe", "smartmoe_f1")


class Watched:
    """Ranks that tell which system came first in every iteration that has all of them."""

    source: Source = "local"
    device: Device = "cpu"
    timeout = timedelta(minutes=2)

    def __init__(self, hierarchy: Hierarchy) -> None:
        self._ranks = NewRanks(hierarchy, self.timeout)
        self.first_of: list[int] = []

    def run(self, *args: Any, **others: Any) -> pd.DataFrame:
        """As ever."""
        rows = self._ranks.run(*args, **others)
        steps = rows[(rows["phase"] == "step") & (rows["rank"] == 0) & (rows["iteration"] > 0)]
        self.first_of = [int(group["of"].iloc[0]) for _, group in steps.groupby("iteration")]
        return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    """Records of four systems, measured together on recorded routing."""
    return _measured(tmp_path_factory.mktemp("runs"))


def _measured(folder) -> dict[str, pd.DataFrame]:
    store = RunStore(folder)
    configs = [Composer()(*SMALL, f"system={system}", "routing=stress_hot_adjacent") for system in SYSTEMS]
    world = Watched(configs[0].cluster.hierarchy)
    outcomes = execute_together(configs, store, world=world)
    assert world.first_of == [iteration % len(SYSTEMS) for iteration in range(FIRST, 6)]
    assert [outcome.status for outcome in outcomes] == ["ok"] * len(SYSTEMS), outcomes
    again = execute_together(configs, store)
    assert [outcome.run_id for outcome in again] == [config.run_id for config in configs]
    assert all(outcome.cached for outcome in again)
    return {system: store.read(config.run_id) for system, config in zip(SYSTEMS, configs, strict=True)}


FIRST = 2  # one before 3, the first of 6 that counts


def test_every_system_has_all_ranks_its_warm_up_and_no_wrong_element(rows: dict[str, pd.DataFrame]) -> None:
    for system, records in rows.items():
        assert set(records["system"]) == {system} and set(records["row_bytes"]) == {4096 // 16}
        steps = records[records["phase"] == "step"]
        assert sorted(zip(steps["iteration"], steps["rank"], strict=True)) == [
            (iteration, rank) for iteration in range(FIRST, 6) for rank in range(8)
        ]
        assert (steps["num_wrong"] == 0).all()
        assert (steps["dispatch_ms"] >= steps["wire_ms"]).all() and (steps["wire_ms"] > 0).all()


def test_bytes_and_moves_are_those_of_the_simulation(rows: dict[str, pd.DataFrame], composed: Composer) -> None:
    """The same tokens, the same planner: what is predicted and what is measured cannot drift apart."""
    for system, records in rows.items():
        same = [part for part in SMALL if not part.startswith(("measure", "ranks", "world_size"))]
        config = composed(*same, f"system={system}", "routing=stress_hot_adjacent")
        reduced = config.model_copy(update={"cluster": config.cluster.reduced(8)})
        twin = _simulated(reduced)
        learned, twin = twin[twin["iteration"] < FIRST], twin[twin["iteration"] >= FIRST]
        measured = records[(records["phase"] == "dispatch") & (records["stage"] != "all") & records["bytes"].notna()]
        found = measured[measured["bytes"] > 0].groupby(["iteration", "stage"])["bytes"].max()
        stages = twin[(twin["phase"] == "dispatch") & (twin["bytes"] > 0)]
        expected = stages.set_index(["iteration", "stage"])["bytes"]
        pd.testing.assert_series_equal(found.sort_index(), expected.sort_index(), check_dtype=False)
        moves = records[(records["phase"] == "step") & (records["rank"] == 0)].set_index("iteration")
        steps = twin[twin["phase"] == "step"].set_index("iteration")
        assert moves["moves"].tolist() == steps["moves"].tolist()
        first = place = Placement.identity(config.model.num_experts)
        for text in learned.loc[learned["phase"] == "step", "moves"]:
            place = place.after(text) if text else place
        assert records.loc[records["phase"] == "start", "moves"].tolist() == [first.moves_to(place)]
        gained = steps["realised_gain_ms"].tolist()
        assert moves["realised_gain_ms"].tolist() == pytest.approx(gained, rel=1e-9, nan_ok=True)
    assert (rows["hiermoe"].groupby("iteration")["moves"].max() != "").all()
    assert not math.isnan(rows["hiermoe"]["realised_gain_ms"].max())


def _simulated(config) -> pd.DataFrame:
    from hiermoe.measure.predict import simulate

    records = simulate(open_workload(config))
    blank = pd.DataFrame({"moves": "", "realised_gain_ms": math.nan}, index=records.index)
    return records.combine_first(blank).fillna({"moves": ""})


@pytest.mark.slow
def test_a_system_that_does_not_apply_ends_no_other(composed: Composer, store: RunStore) -> None:
    configs = [composed(*SMALL, f"system={system}", "iterations=2") for system in ("hd4", "hd2")]
    outcomes = execute_together(configs, store)
    assert [outcome.status for outcome in outcomes] == ["not_applicable", "ok"]
    assert execute(configs[0], store).cached


@pytest.mark.slow
@pytest.mark.parametrize("system", ["hiermoe_search", "hiermoe_search_online"])
def test_ranks_search_alike_and_experts_move_between_them(system: str, composed: Composer, store: RunStore) -> None:
    """All ranks decide from summed sketches; a rank that found another placement would end the run."""
    policy = [f"system.policy.{key}={value}" for key, value in (("first_search", 3), ("cells", 256), ("steps", 30))]
    config = composed(
        "measure=replay", "ranks=local", "world_size=4", *SMALL[3:], f"system={system}", *policy, "routing=recorded"
    )
    outcome = execute(config, store)
    assert outcome.status == "ok", outcome.reason
    steps = store.read(outcome.run_id)
    steps = steps[steps["phase"] == "step"].sort_values("iteration")
    assert (steps["num_wrong"] == 0).all()
    for _, of_rank in steps.groupby("rank"):
        moved = of_rank["moved_experts"].tolist()
        assert moved[0] > 0  # after iteration 2, the first replayed; the policy remembers those before
        assert moved[1:] == [0] * 3 if system == "hiermoe_search" else max(moved) <= 8
