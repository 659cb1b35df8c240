"""A system that moves no experts costs nothing after a step: no collective, no message."""

from typing import Any

import pytest
import torch

from hiermoe.policies.system import SystemConfig
from hiermoe.ranks.launch import run_ranks
from hiermoe.topology.cluster import Cluster
from tests.megatron.moving import TIMEOUT, system
from tests.megatron.parallel_model import SEQUENCE, VOCABULARY, ParallelModel

CASES: dict[str, SystemConfig | str] = {"hd_moe": "hd_moe", "static": system(None, "hd1")}
CASES |= {"watching": system("Watch", "hd1"), "moving": system("Shuffle", "hd1")}


def exchanges(function: Any) -> list[str]:
    """Every operation of a process group that a call starts, whoever calls it: as torch's own profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return [event.key for event in profile.key_averages() if event.key.startswith("c10d::")]


def step_once(rank: int) -> dict[str, list[str]]:
    """What `placement.step` exchanges on this rank of a pipeline, by system."""
    from hiermoe.megatron.attach import attach, detach

    model = ParallelModel([1, 1], ep_size=2)
    cluster = Cluster.named("a6000_4x8").reduced(2)
    seen = {}
    for name, chosen in CASES.items():
        placement = attach([*model.chunks], chosen, cluster, timeout=TIMEOUT)
        model.step(torch.randint(VOCABULARY, (2, 2, SEQUENCE), generator=torch.Generator().manual_seed(rank)))
        seen[name] = exchanges(lambda placement=placement: placement.step(model.optimizer))
        placement.go_home(model.optimizer)
        detach([*model.chunks])
    return seen


@pytest.fixture(scope="module")
def seen() -> list[dict[str, list[str]]]:
    return run_ranks(step_once, 4, (), TIMEOUT)


@pytest.mark.parametrize("name", ["hd_moe", "static"])
def test_a_static_policy_exchanges_nothing(seen: list[dict[str, list[str]]], name: str) -> None:
    assert all(rank[name] == [] for rank in seen)


def test_a_policy_that_measures_sums_what_it_measured_and_compares_and_moves_nothing_for_it(
    seen: list[dict[str, list[str]]],
) -> None:
    for rank in seen:
        assert rank["watching"] == ["c10d::allreduce_"]
        assert {"c10d::send", "c10d::recv_"} <= set(rank["moving"])
