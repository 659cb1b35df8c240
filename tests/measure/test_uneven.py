"""GPUs that hold unequally many experts, on clusters whose sizes are no powers of two."""

import re
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from hiermoe.advice.advice_config import AdviceConfig
from hiermoe.advice.assessment import assess
from hiermoe.advice.inputs import resolve
from hiermoe.advice.systems import candidates
from hiermoe.measure.bound import bound_times
from hiermoe.measure.predict import simulate
from hiermoe.measure.walk import walk
from hiermoe.measure.workload import open_workload
from hiermoe.planner.counts import count_routing
from hiermoe.policies.price_of_moving import price_migration
from hiermoe.records.project import CONF
from hiermoe.runs.compose import compose
from hiermoe.runs.run_config import RunConfig
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.placement import Placement
from tests.conftest import Command

SHAPES = {"3x8": (3, 8), "6x4": (6, 4), "5x6": (5, 6)}
MODEL = ["model=deepseek_v3", "model.router.num_groups=null", "model.router.group_topk=null"]
RIVALS = ("eplb", "eplb_hierarchical", "ultraep", "llep", "fastermoe", "echo", "echo_sinkhorn", "moonep", "laer")
RIVALS += ("placemoe", "placemoe_unplanned", "hiermoe_copies")
SMALL = ["routing=topic", "tokens_per_rank=24", "iterations=12"]


@pytest.fixture(scope="session")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of clusters that nobody ships: nodes x GPUs, a NIC for each GPU; and the shipped rack of 72."""
    folder = tmp_path_factory.mktemp("clusters")
    names = {"72": "gb200_nvl72_rack"}
    for name, (nodes, gpus) in SHAPES.items():
        source = yaml.safe_load((CONF / "cluster" / "h100_ib400.yaml").read_text())
        source["name"] = f"nodes_{name}"
        source["levels"][0]["groups"], source["levels"][1]["groups"] = nodes, nodes * gpus
        path = folder / f"nodes_{name}.yaml"
        path.write_text(yaml.safe_dump(source))
        names[name] = str(path)
    return names


def run(cluster: str, experts: int, *overrides: str) -> RunConfig:
    """A simulated run."""
    sizes = [f"model.num_experts={experts}", "model.topk=6", f"cluster={cluster}", "wandb.mode=disabled"]
    return compose("config", [*MODEL, *SMALL, *sizes, *overrides], RunConfig)


@pytest.mark.parametrize(("experts", "ranks"), [(160, 24), (384, 72), (160, 72), (7, 5), (128, 32), (9, 9)])
def test_first_places_spread_experts_evenly_and_in_order(experts: int, ranks: int) -> None:
    placement = Placement.first(experts, ranks)
    of_ranks = placement.expert_at_S.view(ranks, -1)
    held = (of_ranks < experts).sum(1)
    assert int(held.max()) - int(held.min()) == (experts % ranks > 0) and int(held.sum()) == experts
    assert of_ranks[of_ranks < experts].tolist() == list(range(experts))
    for groups in (n for n in range(1, ranks) if ranks % n == 0):  # whatever the levels are, their groups are even too
        of_groups = held.view(groups, -1).sum(1)
        assert int(of_groups.max()) - int(of_groups.min()) <= 1


def test_where_gpus_hold_equally_many_nothing_changes() -> None:
    assert Placement.first(128, 32).key == Placement.identity(128).key


@pytest.mark.parametrize(("name", "experts"), [("3x8", 160), ("6x4", 160), ("72", 160), ("72", 384), ("5x6", 43)])
def test_counts_are_those_of_tokens_one_by_one(name: str, experts: int, clusters: dict[str, str]) -> None:
    workload = open_workload(run(clusters[name], experts))
    hierarchy, placement = workload.cluster.hierarchy, workload.first_places
    gpu_of = {expert: slot // placement.per_rank(hierarchy.num_ranks) for expert, slot in enumerate(placement.slot_E)}
    step = workload.routing.step(3)
    counts = count_routing(step, placement, hierarchy)
    for level in range(1, hierarchy.depth + 1):
        naive = np.zeros((hierarchy.num_ranks, hierarchy.U[level]), np.int64)
        for source, ids in zip(step.source_N.tolist(), step.expert_ids_NK.tolist(), strict=True):
            for group in {int(gpu_of[expert]) // hierarchy.lanes(level) for expert in ids}:
                naive[source, group] += 1
        np.testing.assert_array_equal(counts.tokens[level - 1].numpy(), naive)
    assert int(step.expert_ids_NK.max()) < experts  # nobody chooses an empty slot


@pytest.mark.parametrize("system", ["hiermoe", "hiermoe_multi", "smartmoe_f1", "hiermoe_search", "tutel_2dh_padded"])
@pytest.mark.parametrize(("name", "experts"), [("3x8", 160), ("72", 384)])
def test_experts_that_move_stay_whole_and_no_gpu_gets_more_than_it_has_room_for(
    system: str, name: str, experts: int, clusters: dict[str, str]
) -> None:
    workload = open_workload(run(clusters[name], experts, f"system={system}"))
    rows = simulate(workload)
    steps = rows[rows["phase"] == "step"]
    assert (steps["predicted_ms"] > 0).all()
    placement = workload.first_places
    for moves in steps.get("moves", steps["stage"].map(lambda _: "")).fillna(""):
        moved = placement.after(moves)
        assert torch.equal(moved.expert_at_S.sort().values, torch.arange(placement.num_slots))
        placement = moved
    if system == "smartmoe_f1":
        assert steps["moved_experts"].sum() > 0


@pytest.mark.parametrize("system", RIVALS)
@pytest.mark.parametrize(("name", "experts"), [("3x8", 160), pytest.param("72", 384, marks=pytest.mark.slow)])
def test_copies_of_experts_fit_beside_empty_slots(
    system: str, name: str, experts: int, clusters: dict[str, str]
) -> None:
    changed = ["system.policy.interval=1"] if system.startswith("eplb") else []
    changed += [f"system.policy.{key}" for key in ("layout_interval=6", "window=1", "sweeps=0") if system == "placemoe"]
    workload = open_workload(run(clusters[name], experts, f"system={system}", *changed))
    hierarchy, guests = workload.cluster.hierarchy, 0
    for visit in walk(workload, workload.new_policy()):
        at_GS = visit.placement.expert_at_S.view(hierarchy.num_ranks, -1)
        guests += at_GS.shape[1] - visit.home.num_slots // hierarchy.num_ranks + visit.home.has_copies
        used = visit.counts.pairs_GS.sum(0) > 0
        assert int(visit.placement.expert_at_S[used].max()) < experts  # empty slots have no tokens
        assert int(visit.counts.pairs_GS.sum()) == visit.chosen.traffic.total_pairs
    assert guests > 0 or system == "fastermoe"
    steps = simulate(workload).query("phase == 'step'")
    assert (steps["net_ms"] >= steps["predicted_ms"]).all() and steps["copies_bytes"].notna().all()


def test_only_experts_cost_something_to_move(clusters: dict[str, str]) -> None:
    cluster = Cluster.named(clusters["3x8"])
    first = Placement.first(160, 24)
    expert, empty = 0, 160
    moved = first.swapped(expert, empty)
    assert price_migration(first, moved, cluster, 1000, 160).moved_experts == 1
    assert price_migration(first, moved, cluster, 1000).moved_experts == 2  # where all slots hold experts
    assert price_migration(first, first.swapped(160, 166), cluster, 1000, 160).moved_bytes == 0


def test_no_placement_goes_below_the_bound(clusters: dict[str, str]) -> None:
    config = run(clusters["3x8"], 160, "system=hiermoe")
    workload = open_workload(config)
    bound = bound_times(workload).query("phase == 'step'").set_index("iteration")["predicted_ms"]
    reached = simulate(workload).query("phase == 'step'").set_index("iteration")["predicted_ms"]
    assert (reached[bound.index] >= bound).all()


@pytest.mark.parametrize(("name", "experts"), [("3x8", 160), ("6x4", 160), ("72", 160), ("72", 384)])
def test_advice_and_runs_answer_to_the_digit(name: str, experts: int, clusters: dict[str, str]) -> None:
    sizes = [f"num_experts={experts}", "topk=6", "hidden_size=7168", "moe_ffn_hidden_size=2048"]
    case = resolve(compose("advise", [*SMALL, f"cluster={clusters[name]}", *sizes], AdviceConfig)).cases[0]
    assert any(f"{experts} experts on" in note for note in case.notes)
    ours = assess(case, candidates(case.cluster, ["hd_moe"])[0]).named("hd_moe").held_out
    steps = simulate(open_workload(run(clusters[name], experts, "system=hd_moe"))).query("phase == 'step' and counted")
    np.testing.assert_allclose(ours.step_ms(case.cluster), steps["predicted_ms"], rtol=1e-12)


def test_real_ranks_refuse_unevenness_before_any_starts(hiermoe: Command) -> None:
    on_ranks = ["measure=replay", "ranks=local", "cluster=a6000_1x8", "model.num_experts=100", "routing=uniform"]
    code, _, err = hiermoe("run", *on_ranks, "iterations=4", "tokens_per_rank=16", "wandb.mode=disabled")
    assert code != 0 and "num_experts=100 is not divisible by ep_size=8" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("cluster", "sizes"),
    [
        ("gb200_nvl72_ib400", {"ep_size": 72}),
        ("h100_ib400", {"ep_size": 12}),
        ("a6000_4x8", {"ep_size": 27}),
        ("cloud_eth100", {"ep_size": 31}),
        ("gb200_nvl72_rack", {"world_size": 72, "max_ep_size": 50}),
        ("h100_ib400", {"world_size": 96, "max_ep_size": 40}),
    ],
)
def test_sizes_that_a_refusal_names_work(cluster: str, sizes: dict[str, int]) -> None:
    command, schema = ("advise", AdviceConfig) if "ep_size" in sizes else ("config", RunConfig)

    def answer(changed: dict[str, int]) -> Any:
        given = [f"{key}={value}" for key, value in changed.items()]
        config = compose(command, [*MODEL, *SMALL, f"cluster={cluster}", *given], schema)
        return resolve(config) if isinstance(config, AdviceConfig) else open_workload(config)

    with pytest.raises(ValueError, match="take ") as refused:
        answer(sizes)
    named = [int(size) for size in re.findall(r"\d+", str(refused.value).partition("take ")[2])]
    assert len(named) == 2
    key = "ep_size" if "ep_size" in sizes else "max_ep_size"
    for size in named:
        answer(sizes | {key: size})
