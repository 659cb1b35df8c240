"""Stages of a pipeline under moving experts: several micro-batches in flight, chunks, a stage without experts."""

from typing import Any

import pytest
import torch

from hiermoe.dispatch.communicators import played_hosts
from hiermoe.ranks.launch import run_ranks
from hiermoe.topology.cluster import Cluster
from tests.megatron.moving import TIMEOUT, system
from tests.megatron.pipelined import SEQUENCE, VOCABULARY, Pipelined

STAGES, EP_SIZE, STEPS = 2, 2, 10


def train(rank: int, has_experts: list[int], virtual: int | None, recompute: bool) -> dict[str, Any]:
    """Losses of every step under stock Megatron and under experts that all move after every step."""
    from hiermoe.megatron.attach import attach

    cluster = Cluster.named("a6000_4x8").reduced(EP_SIZE)
    seen: dict[str, Any] = {}
    for name in ("stock", "moving"):
        pipelined = Pipelined(has_experts, STAGES, virtual, EP_SIZE, recompute)
        placement = None
        if name == "moving":
            placement = attach([*pipelined.chunks], system("Shuffle", "hd1"), cluster, timeout=TIMEOUT)
        generator = torch.Generator().manual_seed(rank % EP_SIZE)
        seen[name], moved = [], 0
        for _ in range(STEPS):
            seen[name].append(pipelined.step(torch.randint(VOCABULARY, (6, 2, SEQUENCE), generator=generator)))
            if placement is not None:
                moved += sum(update.moved_experts for update in placement.step(pipelined.optimizer))
        seen["moved"] = moved
    return seen


@pytest.mark.parametrize(
    ("has_experts", "virtual", "recompute"),
    [([0, 0, 1, 1], None, False), ([0, 1, 1, 1], 2, False), ([1, 1, 1, 1], 2, True)],
    ids=["one stage is dense", "two chunks a stage", "recomputed"],
)
def test_moving_experts_leave_the_losses_of_a_pipeline_as_they_are(
    has_experts: list[int], virtual: int | None, recompute: bool
) -> None:
    hosts = played_hosts(Cluster.named("a6000_4x8").reduced(EP_SIZE).hierarchy) * STAGES
    ranks = run_ranks(train, STAGES * EP_SIZE, (has_experts, virtual, recompute), TIMEOUT, hosts=hosts)
    last = ranks[EP_SIZE:]
    for rank in last:
        assert len(rank["stock"]) == STEPS and all(len(losses) == 6 for losses in rank["stock"])
        for before, after in zip(rank["stock"], rank["moving"], strict=True):
            assert after == pytest.approx(before, rel=1e-9)
    assert last[0]["stock"][-1] != last[0]["stock"][0]
    assert all(rank["moved"] > 0 for rank in last)
    assert (ranks[0]["moved"] > 0) == any(has_experts[: len(has_experts) // 2])
