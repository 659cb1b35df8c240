"""The paper's cluster of 4 x 8 GPUs, four levels deep, as 32 ranks: every system gives the exact answer."""

from typing import Any

import pytest
import torch

from hiermoe.ranks.launch import run_ranks
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.placement import Placement
from tests.dispatch import contract
from tests.dispatch.routings import exact_answer, kept_pairs, numbers_for, placement_of, routing_of
from tests.dispatch.worlds import DEADLINE, NEEDS_GPU, TIMEOUT, TRANSPORTS, World, transport_of

WORLD = World((4, 8, 16, 32))
CASES = ("zipf",)  # with 64 experts
pytestmark = pytest.mark.slow
Results = list[dict[Any, Any]]


@pytest.fixture(scope="module")
def results() -> Results:
    assert WORLD.cluster.hierarchy == Cluster.named("a6000_4x8").hierarchy
    return run_ranks(contract.run_all, 32, (WORLD, CASES), TIMEOUT, deadline=DEADLINE, hosts=WORLD.hosts)


@pytest.mark.parametrize("moved", [False, True], ids=["experts at home", "experts moved"])
@pytest.mark.parametrize("system", [system for system in TRANSPORTS if system not in NEEDS_GPU])
def test_every_system_gives_the_exact_answer_on_32_ranks(results: Results, system: str, moved: bool) -> None:
    if moved and transport_of(system).executor != "staged":
        return
    (scheme, *_) = transport_of(system).build_schemes(WORLD.cluster.hierarchy)
    for case in CASES:
        routing = routing_of(case, 32)
        placement = placement_of(case, 64) if moved else Placement.identity(64)
        kept = kept_pairs(routing, scheme.padding.capacity_factor) if scheme.lossy and scheme.padding else None
        answer = exact_answer(routing, numbers_for(routing), kept)
        where = contract.MOVED if moved else contract.IDENTITY
        outcomes = [result[system, case, where] for result in results]
        for rank, outcome in enumerate(outcomes):
            assert torch.equal(outcome.output.long(), answer.output[rank]), (case, rank)
            assert torch.equal(outcome.x_gradient.long(), answer.x_gradient[rank]), (case, rank)
            assert torch.equal(outcome.probs_gradient.long(), answer.probs_gradient[rank]), (case, rank)
        by_slot = torch.cat([outcome.weight_gradient_LMM for outcome in outcomes]).long()
        assert torch.equal(by_slot[placement.slot_E], answer.weight_gradient_EMM), case


def test_all_systems_but_those_for_gpus_ran(results: Results) -> None:
    for result in results:
        assert {name for name in result if isinstance(name, str)} == NEEDS_GPU
        dimensions = {name: result[name, "zipf", contract.IDENTITY].scheme for name in ("h4", "hd4")}
        assert dimensions == {"h4": "H4", "hd4": "HD4"}
