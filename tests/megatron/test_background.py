"""Experts that travel beside a step: no number of the run changes, and none is ever half moved."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from hiermoe.megatron.standins import cpu

cpu.expect_fallbacks()

from hiermoe.megatron.checkpoint_folder import newest_first  # noqa: E402
from hiermoe.narrow.corpus import Corpus, training_corpus  # noqa: E402
from hiermoe.narrow.training_config import TrainingConfig  # noqa: E402
from hiermoe.policies.protocol import PlacementUpdate, StepContext  # noqa: E402
from hiermoe.ranks.server import RankFailedError  # noqa: E402
from hiermoe.topology.placement import Placement  # noqa: E402
from tests.megatron.moving import BOTH, STOCK, Run, Shuffle, joined, largest_error, launch, small, system  # noqa: E402
from tests.megatron.test_distributed_optimizer import odd, shares, whole  # noqa: E402

STATIC = system(None, "hd1")
TRAVELLING = system("Shuffle", "hd1").model_copy(update={"migration": "background"})
Seen = dict[Any, Any]


class Late(Shuffle):
    """As the others from the second step on."""

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        return super().decide(summed, placement, context) if context.iteration else None


def on_the_way(run: Run) -> int:
    return len(run.placement._on_the_way)


def train(rank: int, config: TrainingConfig, corpus: Corpus, steps: int) -> Seen:
    """Fixed and travelling experts; what was on its way after every step."""
    seen: Seen = {}
    for name, one in (("fixed", STATIC), ("travelling", TRAVELLING)):
        run = Run(config, corpus, one)
        under_way = []
        for _ in range(steps):
            run.train(1)
            under_way.append(on_the_way(run))
        seen[name] = {"losses": run.losses, "updates": run.updates, "under_way": under_way}
        if config.distributed_optimizer:
            seen[name]["state"] = shares(run)
        else:
            seen[name]["tensors"] = run.copied()
        hidden = [update.hidden_ms for update in run.placement._landed]
        assert not hidden  # what has landed was told
    return seen


def check(ranks: list[Seen], layers: int, steps: int) -> None:
    fixed, travelling = ranks[0]["fixed"], ranks[0]["travelling"]
    assert travelling["losses"] == pytest.approx(fixed["losses"], rel=1e-9)
    # Sent off after the first step, the third and so on; in their places from the next on, and told then.
    assert travelling["under_way"] == [layers * ((step + 1) % 2) for step in range(steps)]
    assert [len(updates) for updates in travelling["updates"]] == [layers * (step % 2) for step in range(steps)]
    assert all(sent > 0 for rank in ranks for step in rank["travelling"]["updates"] for _, _, sent in step)


@pytest.mark.parametrize("data_parallel", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_experts_that_travel_change_neither_loss_nor_what_training_goes_on_from(
    data_parallel: int, cache_dir: str
) -> None:
    config = small("deepseek_v3", cache_dir, data_parallel=data_parallel, ep_size=4 // data_parallel)
    ranks = launch(train, config, training_corpus(config), 6)
    check(ranks, 2, 6)
    fixed, travelling = (joined([rank[name]["tensors"] for rank in ranks]) for name in ("fixed", "travelling"))
    assert largest_error(travelling, fixed) < 1e-9


def always_travel(rank: int, config: TrainingConfig, corpus: Corpus, steps: int) -> Seen:
    """The second layer's experts set out a step later than the first one's."""
    seen: Seen = {}
    for name, one in (("stock", STOCK), ("travelling", TRAVELLING)):
        run = Run(config, corpus, one)
        for late in run.placement.layers[1:]:
            late.policy = Late()
        under_way = []
        for _ in range(steps):
            run.train(1)
            under_way.append(on_the_way(run))
        seen[name] = {"losses": run.losses, "tensors": run.copied(), "updates": run.updates, "under_way": under_way}
        run.placement.go_home(run.trainer.optimizer)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("model", BOTH)
def test_fifty_steps_with_experts_under_way_in_each(model: str, cache_dir: str) -> None:
    config = small(model, cache_dir)
    ranks = launch(always_travel, config, training_corpus(config), 50)
    stock, travelling = ranks[0]["stock"], ranks[0]["travelling"]
    assert travelling["under_way"] == [1] * 50
    arrived = [[layer for layer, _, _ in updates] for updates in travelling["updates"]]
    assert arrived == [[], *([layer] for layer in (config.model.num_dense_layers + 1 + i % 2 for i in range(49)))]
    assert travelling["losses"] == pytest.approx(stock["losses"], rel=1e-9)
    found, expected = (joined([rank[name]["tensors"] for rank in ranks]) for name in ("travelling", "stock"))
    assert largest_error(found, expected) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
def test_owners_of_the_distributed_optimizer_change_under_way(overlap: bool, cache_dir: str) -> None:
    changes = {"ep_size": 2, "data_parallel": 2, "overlap": overlap, "distributed_optimizer": True}
    config = odd(small("qwen3_30b_a3b", cache_dir, **changes))
    ranks = launch(train, config, training_corpus(config), 10)
    check(ranks, 1, 10)
    fixed, travelling = (whole([rank[name]["state"] for rank in ranks]) for name in ("fixed", "travelling"))
    assert fixed.keys() == travelling.keys()
    for name, expected in fixed.items():
        assert float((travelling[name] - expected).abs().max()) <= 1e-7 * max(float(expected.abs().max()), 1e-12), name


@pytest.mark.slow
def test_mixed_precision_loses_no_bit(cache_dir: str) -> None:
    config = small("deepseek_v3", cache_dir, topk=1, dtype="bf16")
    ranks = launch(train_without_clipping, config, training_corpus(config), 6)
    fixed, travelling = (joined([rank[name]["tensors"] for rank in ranks]) for name in ("fixed", "travelling"))
    assert ranks[0]["travelling"]["losses"] == ranks[0]["fixed"]["losses"]
    assert largest_error(travelling, fixed) == 0


def train_without_clipping(rank: int, config: TrainingConfig, corpus: Corpus, steps: int) -> Seen:
    seen: Seen = {}
    for name, one in (("fixed", STATIC), ("travelling", TRAVELLING)):
        run = Run(config, corpus, one)
        for part in run.trainer.optimizer.chained_optimizers:  # type: ignore[attr-defined]
            part.config.clip_grad = 0.0  # the norm is a sum over ranks, and so depends on where experts are
        run.train(steps)
        seen[name] = {"losses": run.losses, "tensors": run.copied()}
    return seen


def stop_under_way(rank: int, config: TrainingConfig, corpus: Corpus, folder: Path) -> Seen:
    """Saved while experts travel, gone on with, called home, and gone on from there under stock and themselves."""
    seen: Seen = {}
    run = Run(config, corpus, STOCK).train(6)
    seen["stock"] = run.losses
    run = Run(config, corpus, TRAVELLING).train(3)
    seen["under_way"] = on_the_way(run)
    run.trainer.save(folder, run.finished, run.placement)
    seen["whole"] = run.train(3).losses
    run = Run(config, corpus, TRAVELLING).train(3)
    run.placement.go_home(run.trainer.optimizer)
    seen["home"] = on_the_way(run), all(x.dispatcher.placement.is_identity for x in run.placement.layers)
    seen["called_home"] = run.train(3).losses
    (checkpoint,) = newest_first(folder)
    # In the same process, with others under way that are not of what is loaded.
    run = Run(config, corpus, TRAVELLING).train(5)
    seen["before_loading"] = on_the_way(run)
    run.finished = run.trainer.load(checkpoint, run.placement)
    run.losses.clear()
    seen["loaded_over"] = on_the_way(run), run.train(3).losses
    for name, one in (("stock", STOCK), ("travelling", TRAVELLING)):
        run = Run(config, corpus, one)
        run.finished = run.trainer.load(checkpoint, run.placement)
        seen["resumed", name] = run.train(3).losses
    return seen


@pytest.mark.slow
def test_a_checkpoint_with_experts_under_way_has_them_where_they_were(cache_dir: str, tmp_path: Path) -> None:
    config = small("deepseek_v3", cache_dir)
    seen = launch(stop_under_way, config, training_corpus(config), tmp_path)[0]
    assert seen["under_way"] == 2 and seen["home"] == (0, True)
    for run in ("whole", "called_home"):
        assert seen[run] == pytest.approx(seen["stock"], rel=1e-9), run
    assert seen["before_loading"] == 2 and seen["loaded_over"][0] == 0
    assert seen["loaded_over"][1] == pytest.approx(seen["stock"][3:], rel=1e-9)
    for name in ("stock", "travelling"):
        assert seen["resumed", name] == pytest.approx(seen["stock"][3:], rel=1e-9), name


def forget_the_optimizer(rank: int, config: TrainingConfig, corpus: Corpus) -> str:
    from hiermoe.megatron.attach import detach

    run = Run(config, corpus, TRAVELLING).train(1)
    try:
        detach(run.trainer.model)
    except RuntimeError as error:
        assert "are on their way: call go_home() first" in str(error)
    else:
        return "detached under way"
    del run.trainer.optimizer.step  # the instance's: what a loop calls that kept the method from before
    try:
        run.train(1)
    except RuntimeError as error:
        return str(error)
    return "nobody noticed"


@pytest.mark.slow
def test_an_optimizer_that_steps_past_them_is_an_error(cache_dir: str) -> None:
    config = small("deepseek_v3", cache_dir)
    for said in launch(forget_the_optimizer, config, training_corpus(config)):
        assert said.startswith("experts are on their way, and the optimizer that step() was given has not stepped")


def die_under_way(rank: int, config: TrainingConfig, corpus: Corpus) -> None:
    run = Run(config, corpus, TRAVELLING).train(1)
    assert on_the_way(run) == 2
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    run.train(1)


@pytest.mark.slow
def test_a_rank_that_is_killed_with_experts_under_way_ends_the_others(cache_dir: str) -> None:
    config = small("deepseek_v3", cache_dir)
    with pytest.raises(RankFailedError, match="rank 1"):
        launch(die_under_way, config, training_corpus(config))
