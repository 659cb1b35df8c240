"""Experts and vocabulary that are computed together train as stock Megatron's, which come one after the other."""

from datetime import timedelta
from typing import Any

import pytest
import torch

from hiermoe.narrow.corpus import Corpus, training_corpus
from hiermoe.narrow.training_config import TrainingConfig
from hiermoe.ranks.launch import run_ranks
from tests.narrow.tiny_training import tiny_training

TIMEOUT = timedelta(minutes=10)


def train_both(rank: int, config: TrainingConfig, corpus: Corpus) -> dict[str, list[Any]]:
    """Losses of four steps and gradients of the first, of stock and of joint training."""
    from hiermoe.narrow.joint_compute import compute_jointly
    from hiermoe.narrow.trainer import Trainer

    seen: dict[str, list[Any]] = {}
    for name, prepare in (("stock", lambda model: None), ("joint", compute_jointly)):
        trainer = Trainer(config, TIMEOUT, prepare)
        losses = [trainer.step(trainer.batch(corpus, 0))]
        gradients = {name: x.main_grad.clone() for name, x in trainer.model.named_parameters()}  # type: ignore[attr-defined]
        losses += [trainer.step(trainer.batch(corpus, step)) for step in range(1, 4)]
        seen[name] = [losses, gradients]
        trainer.close()
    return seen


@pytest.mark.parametrize(
    ("model", "sizes"),
    [("qwen3_30b_a3b", {"ep_size": 1, "data_parallel": 2}), ("deepseek_v3", {"ep_size": 2})],
    ids=["replicas", "expert-parallel"],
)
def test_losses_and_gradients_are_those_of_stock_megatron(model: str, sizes: dict[str, Any], cache_dir: str) -> None:
    config = tiny_training(model, cache_dir, seq_length=160, sequences_per_step=4, **sizes)
    for seen in run_ranks(train_both, 2, (config, training_corpus(config)), TIMEOUT):
        stock, joint = seen["stock"], seen["joint"]
        assert joint[0] == pytest.approx(stock[0], rel=1e-5)
        assert joint[1].keys() == stock[1].keys()
        for name, gradient in stock[1].items():
            assert gradient.abs().max() > 0 or "expert" in name, name
            torch.testing.assert_close(joint[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_tokens_that_count_differently_are_refused() -> None:
    from hiermoe.narrow.joint_compute import _Loss

    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    losses = _Loss.apply(hidden, weight, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="no token may count more than another"):
        (losses * torch.arange(4.0)).sum().backward()
