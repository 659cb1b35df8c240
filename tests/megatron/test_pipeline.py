"""Stages of a pipeline under moving experts: micro-batches in flight, chunks, a stage without experts, checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hiermoe.dispatch.communicators import played_hosts
from hiermoe.ranks.launch import run_ranks
from hiermoe.topology.cluster import Cluster
from tests.megatron.moving import TIMEOUT, system
from tests.megatron.pipelined import SEQUENCE, VOCABULARY, Pipelined

STAGES, EP_SIZE, STEPS, HALF = 2, 2, 8, 4


def train(rank: int, has_experts: list[int], virtual: int | None, recompute: bool, folder: Path) -> dict[str, Any]:
    """Losses of every step: of stock Megatron, under experts that all move after every step, and gone on from half."""
    from hiermoe.megatron.attach import attach
    from hiermoe.megatron.checkpoint import load_latest, save_checkpoint

    cluster = Cluster.named("a6000_4x8").reduced(EP_SIZE)
    seen: dict[str, Any] = {}
    # Where the first stage has no experts, Megatron's plain optimizer fails to load what it saved.
    resumed = ("resumed", "resumed by stock") if min(sum(has_experts[:2]), sum(has_experts[2:])) else ()
    for name in ("stock", "moving", *resumed):
        pipelined = Pipelined(has_experts, STAGES, virtual, EP_SIZE, recompute)
        state = [*pipelined.chunks], pipelined.optimizer, pipelined.schedule
        placement = None
        if name in ("moving", "resumed"):
            placement = attach([*pipelined.chunks], system("Shuffle", "hd1"), cluster, timeout=TIMEOUT)
        start = load_latest(folder, *state, placement) if "resumed" in name else 0
        generator = torch.Generator().manual_seed(rank % EP_SIZE)
        seen[name], moved = [], 0
        for step in range(STEPS):
            tokens_NBS = torch.randint(VOCABULARY, (6, 2, SEQUENCE), generator=generator)
            if step < start:
                continue
            seen[name].append(pipelined.step(tokens_NBS))
            if placement is not None:
                moved += sum(update.moved_experts for update in placement.step(pipelined.optimizer))
            if resumed and name == "moving" and step + 1 == HALF:
                save_checkpoint(folder, HALF, *state, placement)
        seen[f"moved, {name}"] = moved
    return seen


@pytest.mark.parametrize(
    ("has_experts", "virtual", "recompute"),
    [
        pytest.param([0, 0, 1, 1], None, False, id="one stage is dense", marks=pytest.mark.slow),
        pytest.param([0, 1, 1, 1], 2, False, id="two chunks a stage"),
        pytest.param([1, 1, 1, 1], 2, True, id="recomputed", marks=pytest.mark.slow),
    ],
)
def test_moving_experts_leave_the_losses_of_a_pipeline_as_they_are(
    has_experts: list[int], virtual: int | None, recompute: bool, tmp_path: Path
) -> None:
    hosts = played_hosts(Cluster.named("a6000_4x8").reduced(EP_SIZE).hierarchy) * STAGES
    arguments = (has_experts, virtual, recompute, tmp_path)
    ranks = run_ranks(train, STAGES * EP_SIZE, arguments, TIMEOUT, hosts=hosts)
    last = ranks[EP_SIZE:]
    for rank in last:
        assert len(rank["stock"]) == STEPS and all(len(losses) == 6 for losses in rank["stock"])
        for name in rank.keys() & {"moving", "resumed", "resumed by stock"}:
            for before, after in zip(rank["stock"][-len(rank[name]) :], rank[name], strict=True):
                assert after == pytest.approx(before, rel=1e-9), name
        half = HALF if min(sum(has_experts[:2]), sum(has_experts[2:])) else 0
        assert [len(rank.get(name, ())) for name in ("moving", "resumed", "resumed by stock")] == [STEPS, half, half]
    assert last[0]["stock"][-1] != last[0]["stock"][0]
    assert all(rank[f"moved, {name}"] > 0 for rank in last for name in rank.keys() & {"moving", "resumed"})
    assert (ranks[0]["moved, moving"] > 0) == any(has_experts[: len(has_experts) // 2])
