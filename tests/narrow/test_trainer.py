"""Stock Megatron trains on CPU in three precisions, with replicas and with recomputation, as it should."""

from datetime import timedelta
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from hiermoe.narrow.corpus import Corpus, training_corpus
from hiermoe.narrow.training_config import TrainingConfig
from hiermoe.ranks.launch import run_ranks
from tests.narrow.tiny_training import tiny_training

TIMEOUT = timedelta(minutes=10)
STEPS = 4
both = pytest.mark.parametrize("model", ["qwen3_30b_a3b", "deepseek_v3"])


def train(rank: int, config: TrainingConfig, corpus: Corpus, steps: int) -> dict[str, Any]:
    """Train, and tell losses and types."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.moe.router import TopKRouter

    from hiermoe.narrow.trainer import Trainer

    forwards, prepared = [], []

    def prepare(model: GPTModel) -> None:
        prepared.append(type(model) is GPTModel)
        router = next(module for module in model.modules() if isinstance(module, TopKRouter))
        router.register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))

    trainer = Trainer(config, TIMEOUT, prepare)
    losses = [trainer.step(trainer.batch(corpus, step)) for step in range(steps)]
    parameters = list(trainer.model.parameters())
    optimizers = [part.optimizer for part in trainer.optimizer.chained_optimizers]  # type: ignore[attr-defined]
    return {
        "losses": losses,
        "forwards": forwards,
        "prepared": prepared,
        "parameters": {x.dtype for x in parameters},
        "gradients": {x.main_grad.dtype for x in parameters},  # type: ignore[attr-defined]
        "masters": {x.dtype for optimizer in optimizers for group in optimizer.param_groups for x in group["params"]},
        "moments": {
            state[name].dtype
            for optimizer in optimizers
            for state in optimizer.state.values()
            for name in ("exp_avg", "exp_avg_sq")
        },
        "expert_bias": {x.dtype for name, x in trainer.model.named_buffers() if name.endswith("expert_bias")},
    }


def trained(config: TrainingConfig, steps: int = STEPS) -> dict[str, Any]:
    """What rank 0 tells; all ranks tell the same losses."""
    results = run_ranks(train, config.world_size, (config, training_corpus(config), steps), TIMEOUT)
    assert all(result["losses"] == results[0]["losses"] for result in results)
    return results[0]


def loss_and_norm_from_outside(rank: int, config: TrainingConfig, corpus: Corpus) -> tuple[list[float], list[float]]:
    """On one rank: the loss that training tells and torch's own; the norm that clipping uses and torch's own."""
    from hiermoe.narrow.precision import float32_means_float64
    from hiermoe.narrow.trainer import Trainer

    trainer = Trainer(config, TIMEOUT)
    sequences = trainer.batch(corpus, 0)
    inputs, targets = sequences[:, :-1], sequences[:, 1:]
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    with torch.no_grad(), float32_means_float64():
        logits = trainer.model(inputs, positions, attention_mask=None)
    own_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = trainer.step(sequences)
    from hiermoe.megatron.standins import cpu

    with cpu.cuda_means_cpu(), float32_means_float64():
        norm = trainer.optimizer.get_grad_norm()  # type: ignore[attr-defined]
    gradients = [x.main_grad.flatten() for x in trainer.model.parameters()]  # type: ignore[attr-defined]
    return [loss, own_loss.item()], [norm, torch.cat(gradients).norm().item()]


def balanced(rank: int, config: TrainingConfig, corpus: Corpus, times: list[tuple[float, float]]) -> list[Any]:
    """After one step under each strength of balancing: gradients of all routers, and the largest expert bias."""
    from hiermoe.narrow.trainer import Trainer

    seen = []
    for aux_loss_times, bias_rate_times in times:
        trainer = Trainer(config, TIMEOUT)
        trainer.balance(aux_loss_times, bias_rate_times)
        trainer.step(trainer.batch(corpus, 0))
        routers = [x.main_grad for name, x in trainer.model.named_parameters() if name.endswith("router.weight")]  # type: ignore[attr-defined]
        biases = [x for name, x in trainer.model.named_buffers() if name.endswith("expert_bias")]
        seen.append((torch.cat(routers).clone(), max((float(x.abs().max()) for x in biases), default=None)))
        trainer.close()
    return seen


@both
def test_balancing_is_as_many_times_stronger_as_it_is_told(model: str, cache_dir: str) -> None:
    config = tiny_training(model, cache_dir, ep_size=1, router={"aux_loss_coeff": 0.5})
    times = [(1.0, 1.0), (2.0, 20.0), (3.0, 1.0)]
    (seen,) = run_ranks(balanced, 1, (config, training_corpus(config), times), TIMEOUT)
    (plain, bias), (twice, larger_bias), (thrice, same_bias) = seen
    # Gradients are clipped to one norm, of which the routers' are the part that balancing changes.
    assert not torch.equal(plain, twice) and not torch.equal(twice, thrice)
    if model == "deepseek_v3":
        assert (bias, larger_bias, same_bias) == pytest.approx((0.001, 0.02, 0.001))


@both
def test_fp64_is_float64_in_parameters_gradients_and_moments(model: str, cache_dir: str) -> None:
    seen = trained(tiny_training(model, cache_dir, dtype="fp64"), steps=2)
    assert seen["parameters"] == seen["gradients"] == seen["masters"] == seen["moments"] == {torch.float64}


@both
def test_fp64_rounds_neither_the_loss_nor_the_norm_that_clips(model: str, cache_dir: str) -> None:
    config = tiny_training(model, cache_dir, dtype="fp64", ep_size=1)
    ((losses, norms),) = run_ranks(loss_and_norm_from_outside, 1, (config, training_corpus(config)), TIMEOUT)
    assert losses[0] == pytest.approx(losses[1], rel=1e-14)
    assert norms[0] == pytest.approx(norms[1], rel=1e-14)


@both
def test_bf16_trains_on_fp32_masters_and_gradients_near_the_fp32_run(model: str, cache_dir: str) -> None:
    seen = trained(tiny_training(model, cache_dir, dtype="bf16"))
    assert seen["parameters"] == {torch.bfloat16}
    assert seen["gradients"] == seen["masters"] == seen["moments"] == {torch.float32}
    assert seen["expert_bias"] == ({torch.float32} if model == "deepseek_v3" else set())
    reference = trained(tiny_training(model, cache_dir))
    assert seen["losses"] == pytest.approx(reference["losses"], rel=1e-3)
    assert seen["losses"] != reference["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
def test_recomputation_runs_the_layer_twice_and_changes_no_bit_of_the_loss(dtype: str, cache_dir: str) -> None:
    kept = trained(tiny_training("deepseek_v3", cache_dir, dtype=dtype))
    recomputed = trained(tiny_training("deepseek_v3", cache_dir, dtype=dtype, recompute=True))
    assert kept["forwards"] == [True] * STEPS
    assert recomputed["forwards"] == [False, True] * STEPS
    assert recomputed["losses"] == kept["losses"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "router"),
    # Megatron scales the loss that balances over all ranks by their number, so it cannot be the same.
    [("qwen3_30b_a3b", {"aux_loss_type": "none", "aux_loss_coeff": 0.0}), ("deepseek_v3", {})],
    ids=["qwen3_30b_a3b", "deepseek_v3"],
)
def test_replicas_train_like_one_with_twice_the_sequences(model: str, router: dict[str, Any], cache_dir: str) -> None:
    one = trained(tiny_training(model, cache_dir, router=router, dtype="fp64"), steps=8)
    two = trained(tiny_training(model, cache_dir, router=router, dtype="fp64", data_parallel=2), steps=8)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-9)
    assert len(set(one["losses"])) == 8


def test_prepare_gets_the_bare_model_of_every_precision(cache_dir: str) -> None:
    for dtype in ("fp32", "bf16"):
        config = tiny_training("qwen3_30b_a3b", cache_dir, dtype=dtype, ep_size=1)
        assert trained(config, steps=1)["prepared"] == [True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ep_size": 3}, "num_experts=8 is not divisible by ep_size=3"),
        ({"data_parallel": 3}, "sequences_per_step=8 is not divisible by world_size=6"),
        ({"dtype": "fp8"}, "'fp32', 'fp64' or 'bf16'"),
    ],
)
def test_training_that_does_not_fit_is_refused(changes: dict[str, Any], message: str, cache_dir: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_training("qwen3_30b_a3b", cache_dir, **changes)
