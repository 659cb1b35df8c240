"""Moving experts under every way to divide a model: pipelines with chunks, tensors, sequences, context, optimizer."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from hiermoe.dispatch.communicators import played_hosts
from hiermoe.ranks.launch import run_ranks
from hiermoe.topology.cluster import Cluster
from tests.megatron.moving import DEADLINE, TIMEOUT, system
from tests.megatron.parallel_model import SEQUENCE, VOCABULARY, ParallelModel

EP_SIZE, MICRO_BATCHES, LONG = 2, 6, 50


class Layout(NamedTuple):
    """How a model is divided; the fields are `ParallelModel`'s."""

    has_experts: list[int]
    stages: int = 1
    virtual: int | None = None
    tensor: int = 1
    context: int = 1
    replicas: int = 1
    recompute: bool = False
    distributed: bool = False
    grouped: bool = False
    predicted: int = 0
    shared: bool = False

    @property
    def world_size(self) -> int:
        """Ranks; those that share experts are also those that divide sequences."""
        return self.stages * EP_SIZE * self.replicas

    def build(self) -> ParallelModel:
        """This rank's part. *Collective.*"""
        fields = self._asdict()
        del fields["replicas"]
        return ParallelModel(ep_size=EP_SIZE, **fields)


def state_of(model: ParallelModel) -> list[torch.Tensor]:
    """Weights, masters and moments that this rank has, in Megatron's order."""
    found = [x.detach().clone() for chunk in model.chunks for x in chunk.parameters()]
    for part in model.optimizer.chained_optimizers:  # type: ignore[attr-defined]
        if getattr(part, "is_stub_optimizer", False):
            continue
        for group in part.optimizer.param_groups:
            for key in group["params"]:
                moments = part.optimizer.state[key]
                found += [x.detach().clone() for x in (key, moments["exp_avg"], moments["exp_avg_sq"])]
    return found


def train(rank: int, layout: Layout, steps: int, folder: Path | None) -> dict[str, Any]:
    """Losses and final state: of stock Megatron, under experts that move after every step, and gone on from half."""
    from megatron.core import parallel_state

    from hiermoe.megatron.attach import attach, detach
    from hiermoe.megatron.checkpoint import load_latest, save_checkpoint

    cluster = Cluster.named("a6000_4x8").reduced(EP_SIZE)
    seen: dict[str, Any] = {}
    for name in ("stock", "moving", *(("resumed", "resumed by stock") if folder else ())):
        model = layout.build()
        state = [*model.chunks], model.optimizer, model.schedule
        placement = None
        if name in ("moving", "resumed"):
            placement = attach([*model.chunks], system("Shuffle", "hd1"), cluster, timeout=TIMEOUT)
        with model.precision():
            start = load_latest(folder, *state, placement) if folder and "resumed" in name else 0
        generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
        losses, moved = [], 0
        for step in range(steps):
            tokens_NBS = torch.randint(VOCABULARY, (MICRO_BATCHES, 2, SEQUENCE), generator=generator)
            if step < start:
                continue
            losses.append(model.step(tokens_NBS))
            if placement is not None:
                moved += sum(update.moved_experts for update in placement.step(model.optimizer))
            if folder and name == "moving" and step + 1 == steps // 2:
                with model.precision():
                    save_checkpoint(folder, steps // 2, *state, placement)
        if placement is not None:
            placement.go_home(model.optimizer)
            detach([*model.chunks])
        seen[name] = {"losses": losses, "moved": moved, "state": state_of(model)}
        if placement is not None:
            seen[name]["layers"] = [layer.number for layer in placement.layers]
    return seen


PIPELINE = Layout([0, 1, 1, 1], stages=2, virtual=2)


@pytest.mark.parametrize(
    ("layout", "steps"),
    [
        pytest.param(PIPELINE, 4, id="two chunks a stage"),
        pytest.param(PIPELINE, LONG, id="two chunks a stage, 50 steps", marks=pytest.mark.slow),
        pytest.param(Layout([0, 0, 1, 1], stages=2), 8, id="one stage is dense", marks=pytest.mark.slow),
        pytest.param(
            PIPELINE._replace(has_experts=[1, 1, 1, 1], recompute=True), 8, id="recomputed", marks=pytest.mark.slow
        ),
        pytest.param(Layout([0, 1], tensor=2), 4, id="tensors and sequences"),
        pytest.param(Layout([0, 1], tensor=2), LONG, id="tensors and sequences, 50 steps", marks=pytest.mark.slow),
        pytest.param(Layout([0, 1], context=2), 4, id="context"),
        pytest.param(Layout([0, 1], context=2), LONG, id="context, 50 steps", marks=pytest.mark.slow),
        pytest.param(Layout([0, 1], distributed=True), LONG, id="optimizer divided, 50 steps", marks=pytest.mark.slow),
        pytest.param(
            Layout([0, 1], distributed=True, replicas=2),
            LONG,
            id="optimizer divided among replicas, 50 steps",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Layout([0, 1], grouped=True, replicas=2, distributed=True),
            4,
            id="grouped, optimizer divided",
            marks=[pytest.mark.slow, pytest.mark.settings],
        ),
        pytest.param(
            Layout([1, 1], predicted=1, shared=True, distributed=True),
            4,
            id="predicts two tokens",
            marks=[pytest.mark.slow, pytest.mark.settings],
        ),
        pytest.param(
            PIPELINE._replace(predicted=1, shared=True), 8, id="predicts two tokens, in chunks", marks=pytest.mark.slow
        ),
        pytest.param(Layout([0, 1], grouped=True), 12, id="grouped", marks=pytest.mark.slow),
        pytest.param(
            PIPELINE._replace(tensor=2, grouped=True, distributed=True, replicas=2),
            8,
            id="all at once",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_moving_experts_change_neither_losses_nor_what_training_goes_on_from(
    layout: Layout, steps: int, tmp_path: Path
) -> None:
    hosts = played_hosts(Cluster.named("a6000_4x8").reduced(EP_SIZE).hierarchy) * (layout.world_size // EP_SIZE)
    # Where a stage has no experts, Megatron's plain optimizer fails to load what it saved. Of two trainings of a layout
    # the longer one is not gone on with.
    half = len(layout.has_experts) // 2
    saves = layout.stages == 1 or all(map(any, (layout.has_experts[:half], layout.has_experts[half:])))
    saves = saves and steps < LONG
    ranks = run_ranks(
        train, layout.world_size, (layout, steps, tmp_path if saves else None), TIMEOUT, deadline=DEADLINE, hosts=hosts
    )
    last = ranks[-layout.world_size // layout.stages :]
    for rank in last:
        assert len(rank["stock"]["losses"]) == steps and all(len(x) == MICRO_BATCHES for x in rank["stock"]["losses"])
        assert all((rank[name]["moved"] > 0) == (name in ("moving", "resumed")) for name in rank)
        for name in rank.keys() - {"stock"}:
            went_on = rank[name]["losses"]
            assert len(went_on) == (steps if name == "moving" else steps // 2)
            for before, after in zip(rank["stock"]["losses"][-len(went_on) :], went_on, strict=True):
                assert after == pytest.approx(before, rel=1e-9), name
    numbers = [number for number, has in enumerate(layout.has_experts, start=1) if has]
    numbers += [len(layout.has_experts) + 1] * layout.predicted
    for name in ranks[0].keys() & {"moving", "resumed"}:
        assert sorted({layer for rank in ranks for layer in rank[name]["layers"]}) == numbers
        assert all(len(set(rank[name]["layers"])) == len(rank[name]["layers"]) for rank in ranks)
    assert last[0]["stock"]["losses"][-1] != last[0]["stock"]["losses"][0]
    for rank in ranks:
        for name in rank.keys() - {"stock"}:
            for found, expected in zip(rank[name]["state"], rank["stock"]["state"], strict=True):
                assert float((found - expected).abs().max()) <= 1e-7 * max(float(expected.abs().max()), 1e-12), name
