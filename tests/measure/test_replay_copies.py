"""Systems with copies on real ranks: exact answers, the simulation's bytes and moves, one line where a rank dies."""

import os
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hiermoe.measure.predict import simulate
from hiermoe.measure.workload import open_workload
from hiermoe.policies.protocol import CopyTerms, PlacementPolicy, PlacementUpdate, StepContext
from hiermoe.policies.system import SystemConfig
from hiermoe.records.groups import files_of
from hiermoe.records.store import RunStore
from hiermoe.runs.execute import execute, execute_together
from hiermoe.runs.run_config import RunConfig
from hiermoe.topology.placement import Placement
from tests.conftest import Composer
from tests.planner.cases import random_copies, with_quotas

SMALL = ("measure=replay", "ranks=local", "narrowed=128", "tokens_per_rank=16", "routing=stress_hot_adjacent")
OFTEN = {
    "eplb": ("interval=1",),
    "hd_moe_eplb_by_token": ("interval=1",),
    "placemoe": ("layout_interval=2", "mapping_interval=1"),
}  # decide within few iterations
BYTES = ("copies_bytes", "gradient_bytes", "migration_bytes")


class Guests(PlacementPolicy):
    """Random copies and quotas for every micro-batch; of those with state, another layout of all slots after each."""

    def __init__(
        self, relays_from: int | None = None, gradient_bytes: int = 4, with_state: bool = False, dies_on: int = -1
    ) -> None:
        self.copies = CopyTerms(not with_state, gradient_bytes, relays_from, with_state=with_state)
        self.dies_on = dies_on

    def rebalance(self, pairs_GE: Tensor, placement: Placement, context: StepContext) -> Placement | None:
        if dist.is_initialized() and dist.get_rank() == self.dies_on:
            os._exit(7)
        return None if self.copies is None or self.copies.with_state else self._drawn(context)

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        assert self.copies is not None
        return PlacementUpdate(self._drawn(context), None) if self.copies.with_state else None

    def _drawn(self, context: StepContext) -> Placement:
        ranks, experts = context.cluster.hierarchy.num_ranks, context.num_experts
        assert experts is not None
        generator = torch.Generator().manual_seed(context.iteration)
        return with_quotas(random_copies(experts, experts + 4 * ranks, ranks, generator), 5, generator)


def guests(**options: object) -> SystemConfig:
    policy = {"_target_": f"{__name__}.Guests", **options}
    return SystemConfig.named("hd_moe").model_copy(update={"policy": policy})


def configured(ranks: int, iterations: int, *systems: str | SystemConfig) -> list[RunConfig]:
    sizes = (*SMALL, f"world_size={ranks}", f"iterations={iterations}")
    configs = []
    for system in systems:
        name = system if isinstance(system, str) else system.name
        config = Composer()(*sizes, f"system={name}", *[f"system.policy.{x}" for x in OFTEN.get(name, ())])
        configs.append(config if isinstance(system, str) else config.model_copy(update={"system": system}))
    return configs


def check(configs: list[RunConfig], store: RunStore) -> dict[str, pd.DataFrame]:
    """Run them together; every answer is exact, and bytes and moves are those of the simulation."""
    outcomes = execute_together(configs, store)
    assert [outcome.status for outcome in outcomes] == ["ok"] * len(configs), outcomes
    found = {}
    for config in configs:
        records = store.read(config.run_id)
        steps = records[records["phase"] == "step"]
        assert (steps["num_wrong"] == 0).all(), config.system.name
        twin = simulate(open_workload(config))
        twin = twin[(twin["phase"] == "step") & (twin["iteration"] >= steps["iteration"].min())].set_index("iteration")
        assert (steps.groupby("iteration")[list(BYTES)].sum() == twin[list(BYTES)]).all(axis=None), config.system.name
        moves = steps[steps["rank"] == 0].set_index("iteration")["moves"]
        assert moves.tolist() == (twin["moves"].fillna("").tolist() if "moves" in twin else [""] * len(moves))
        gained = twin["realised_gain_ms"].tolist() if "realised_gain_ms" in twin else [float("nan")] * len(twin)
        mine = steps[steps["rank"] == 0]["realised_gain_ms"].tolist()
        assert mine == pytest.approx(gained, rel=1e-9, nan_ok=True)
        net_ms = steps["dispatch_ms"] + steps["copies_ms"] + steps["gradient_ms"]
        assert steps["net_ms"].tolist() == pytest.approx(net_ms.tolist())
        found[config.system.name] = records
    return found


def test_copies_get_weights_and_homes_sums_beside_systems_without_copies(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    systems = [
        "hd_moe", "eplb", "laer", "placemoe_unplanned", "hd_moe_eplb_by_token",
        guests(relays_from=2).model_copy(update={"name": "guests"}),
        guests(gradient_bytes=2, with_state=True).model_copy(update={"name": "wanderers"}),
    ]  # fmt: skip
    configs = configured(4, 3, *systems[:5])
    for system in systems[5:]:
        assert isinstance(system, SystemConfig)
        configs.append(configs[0].model_copy(update={"system": system}))
    records = check(configs, store)
    stages = {
        name: rows[rows["phase"].isin(["copies", "gradients"])].groupby("phase")["stage"].unique().map(set).to_dict()
        for name, rows in records.items()
    }
    assert stages["hd_moe"] == {}
    assert stages["laer"] == stages["guests"] == {"copies": {"weights", "weights again"}, "gradients": {"home"}}
    assert stages["wanderers"] == {"copies": {"sums"}, "gradients": {"home"}}
    for rows in records.values():
        told = rows[rows["phase"] == "copies"].groupby(["iteration", "rank"])["bytes"].sum()
        steps = rows[rows["phase"] == "step"].set_index(["iteration", "rank"])["copies_bytes"]
        assert (told == steps.loc[told.index]).all()


def test_a_rank_that_dies_while_it_plans_copies_ends_the_run_in_one_line(composed: Composer, tmp_path: Path) -> None:
    (config,) = configured(4, 2, guests(dies_on=2))
    outcome = execute(config, RunStore(tmp_path))
    assert outcome.status == "failed" and "\n" not in outcome.reason
    assert "rank 2 of 4 died by exit code 7" in outcome.reason


@pytest.mark.slow
def test_every_system_with_copies_is_exact_and_sends_what_is_predicted(tmp_path: Path) -> None:
    systems = [name for name in files_of("system") if SystemConfig.named(name).makes_copies]
    assert len(systems) >= 15
    check(configured(8, 4, "megatron", *systems), RunStore(tmp_path))


@pytest.mark.slow
def test_thirty_two_ranks_are_exact_too(tmp_path: Path) -> None:
    check(configured(32, 3, "megatron", "ultraep", "eplb", "laer"), RunStore(tmp_path))
