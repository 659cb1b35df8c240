"""The distributed optimizer under moving experts: every owner gets what it must have, and training stays as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hiermoe.megatron.standins import cpu

cpu.expect_fallbacks()

from hiermoe.narrow.corpus import Corpus, training_corpus  # noqa: E402
from hiermoe.narrow.training_config import TrainingConfig  # noqa: E402
from tests.megatron import precision_aware  # noqa: E402
from tests.megatron.moving import Run, joined, launch, small, system  # noqa: E402

Share = tuple[int, int, Tensor]  # first element and the one after the last, of how many, and what they are


def shares(run: Run) -> dict[str, tuple[int, int, Tensor]]:
    """Of every parameter that this rank owns a part of, by logical name: as Megatron itself tells where it belongs."""
    found = {}
    names = {parameter: name for name, parameter in run.trainer.model.named_parameters()}
    for part in run.trainer.optimizer.chained_optimizers:  # type: ignore[attr-defined]
        for parameter in part.model_param_gbuf_map:
            own = part._get_model_param_range_map(parameter)["param"]
            state = part._get_main_param_and_optimizer_states(parameter)
            for kind, tensor in state.items():
                if tensor.dim():
                    name = f"{run.logical(names[parameter])} {kind}"
                    found[name] = own.start, parameter.numel(), tensor.detach().clone().view(-1)
    return found


def whole(ranks: list[dict[str, tuple[int, int, Tensor]]]) -> dict[str, Tensor]:
    """Put together; every element has an owner, and those of replicated parameters are the same."""
    found: dict[str, Tensor] = {}
    for rank in ranks:
        for name, (start, numel, tensor) in rank.items():
            target = found.setdefault(name, torch.full((numel,), torch.nan, dtype=tensor.dtype))
            part = target[start : start + len(tensor)]
            assert bool((part.isnan() | (part == tensor)).all()), name
            part.copy_(tensor)
    assert not [name for name, tensor in found.items() if bool(tensor.isnan().any())]
    return found


def train(rank: int, config: TrainingConfig, corpus: Corpus, steps: int) -> dict[str, Any]:
    """Losses, and what training goes on from, under experts that move in every step and under experts that do not."""
    seen: dict[str, Any] = {}
    for name, policy in (("fixed", None), ("moving", "Shuffle")):
        run = Run(config, corpus, system(policy, "hd1")).train(steps)
        seen[name] = {"losses": run.losses, "state": shares(run), "updates": run.updates}
        run.trainer.model.start_param_sync(force_sync=True)  # which overlapped happens when the next forward begins
        seen[name]["weights"] = {n: x for n, x in run.copied().items() if n.endswith(" weight")}
    return seen


def odd(config: TrainingConfig) -> TrainingConfig:
    """One MoE layer with three experts a rank on two ranks: two replicas divide the one in the middle."""
    shape = config.model.model_dump() | {"num_layers": 1 + config.model.num_dense_layers, "num_experts": 6}
    return TrainingConfig.model_validate(config.model_dump() | {"model": shape})


@pytest.mark.parametrize(
    ("ep_size", "data_parallel", "dtype", "overlap", "steps"),
    [
        pytest.param(2, 1, "fp64", False, 10, id="one replica"),
        pytest.param(2, 2, "fp64", False, 10, id="two replicas"),
        pytest.param(
            2, 2, "fp64", True, 10, id="two replicas, overlapped", marks=[pytest.mark.slow, pytest.mark.settings]
        ),
        pytest.param(2, 2, "bf16", True, 10, id="two replicas, bf16, overlapped"),
    ],
)
def test_moving_experts_change_neither_loss_nor_what_training_goes_on_from(
    ep_size: int, data_parallel: int, dtype: str, overlap: bool, steps: int, cache_dir: str
) -> None:
    changes = {"ep_size": ep_size, "data_parallel": data_parallel, "dtype": dtype, "overlap": overlap}
    config = odd(small("qwen3_30b_a3b", cache_dir, **changes, distributed_optimizer=True))
    ranks = launch(train, config, training_corpus(config), steps)
    fixed, moving = (whole([rank[name]["state"] for rank in ranks]) for name in ("fixed", "moving"))
    assert sum(len(step) for step in ranks[0]["moving"]["updates"]) == steps
    close = 1e-9 if dtype == "fp64" else 0.05
    for before, after in zip(ranks[0]["fixed"]["losses"], ranks[0]["moving"]["losses"], strict=True):
        assert after == pytest.approx(before, rel=close)
    assert fixed.keys() == moving.keys() and {name.split()[-1] for name in fixed} >= {"param", "exp_avg", "exp_avg_sq"}
    weights = joined([rank["moving"]["weights"] for rank in ranks])
    for name, weight in weights.items():
        master = moving[f"{name.removesuffix(' weight')} param"]
        assert torch.equal(weight.view(-1), master.to(weight.dtype)), name
    if dtype == "fp64":
        for name, expected in fixed.items():
            assert float((moving[name] - expected).abs().max()) <= 1e-7 * max(float(expected.abs().max()), 1e-12), name


def train_precision_aware(rank: int, config: TrainingConfig, corpus: Corpus, settings: dict[str, Any]) -> Any:
    """What `train` says, and the types of what the optimizer keeps."""
    with precision_aware.used(**settings):
        seen: dict[str, Any] = train(rank, config, corpus, 5)
        run = Run(config, corpus, system(None, "hd1")).train(1)
    for name in ("fixed", "moving"):
        # Remainders are integers; float64 has every value of either type.
        seen[name]["state"] = {n: (start, size, x.double()) for n, (start, size, x) in seen[name]["state"].items()}
    kept = [part.optimizer.state for part in run.trainer.optimizer.chained_optimizers]  # type: ignore[attr-defined]
    return seen | {"types": {(n, x.dtype) for state in kept for of in state.values() for n, x in of.items()}}


@pytest.mark.parametrize(
    ("remainders", "moments", "overlap"),
    [
        pytest.param(
            True, torch.bfloat16, True, id="remainders, moments in bf16", marks=[pytest.mark.slow, pytest.mark.settings]
        ),
        pytest.param(False, torch.float32, False, id="masters", marks=pytest.mark.slow),
    ],
)
def test_the_precision_aware_optimizers_state_moves_to_the_bit(
    remainders: bool, moments: torch.dtype, overlap: bool, cache_dir: str
) -> None:
    # With one expert a token no sum depends on where experts are, so that equality is to the bit.
    changes = {"ep_size": 2, "data_parallel": 2, "dtype": "bf16", "overlap": overlap, "topk": 1}
    config = odd(small("deepseek_v3", cache_dir, **changes, distributed_optimizer=True))
    settings = {"store_param_remainders": remainders, "exp_avg_dtype": moments, "exp_avg_sq_dtype": moments}
    ranks = launch(train_precision_aware, config, training_corpus(config), settings)
    master = torch.int16 if remainders else torch.float32
    expected = {("exp_avg", moments), ("exp_avg_sq", moments), ("master_param", master)}
    assert all({(n, x) for n, x in rank["types"] if n != "master_param" or x == master} == expected for rank in ranks)
    assert sum(len(step) for step in ranks[0]["moving"]["updates"]) == 5
    assert ranks[0]["moving"]["losses"] == ranks[0]["fixed"]["losses"]
    fixed, moving = (whole([rank[name]["state"] for rank in ranks]) for name in ("fixed", "moving"))
    assert fixed.keys() == moving.keys()
    assert not [name for name in fixed if not torch.equal(fixed[name], moving[name])]
    fixed, moving = (joined([rank[name]["weights"] for rank in ranks]) for name in ("fixed", "moving"))
    assert not [name for name in fixed if not torch.equal(fixed[name], moving[name])]
