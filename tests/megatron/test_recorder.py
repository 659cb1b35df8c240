"""The recorder keeps what stock routers choose, in order, once per micro-batch, and leaves the model as it was."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from hiermoe.megatron.standins import cpu

cpu.expect_fallbacks()

from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402

from hiermoe.megatron.recorder import RouterRecorder, ranked_experts  # noqa: E402
from hiermoe.model import ModelConfig  # noqa: E402
from hiermoe.ranks.launch import run_ranks  # noqa: E402
from hiermoe.records.project import CONF  # noqa: E402

SMALL = {"num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 32, "moe_ffn_hidden_size": 16, "vocab_size": 64}
SEQUENCES, LENGTH = 3, 16


def observe_stock_routers(rank: int, folder: str) -> None:
    """On one rank, for both kinds of router: record, look at the routers from outside, and write what was seen."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from hiermoe.narrow.models import build_model

    cpu.install()
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    for name in ("qwen3_30b_a3b", "deepseek_v3"):
        settings = ModelConfig.from_yaml(CONF / "model" / f"{name}_narrow.yaml").model_dump()
        config = ModelConfig.model_validate({**settings, **SMALL})
        with cpu.cuda_means_cpu():
            model = build_model(config, seq_length=LENGTH, ep_size=1)
        for router in routers_of(model).values():
            if router.expert_bias is not None:
                router.expert_bias.normal_(std=0.1)  # so that the bias changes choices
        Path(folder, f"{name}.json").write_text(json.dumps(observe(model)), encoding="utf-8")


def routers_of(model: torch.nn.Module) -> dict[int, TopKRouter]:
    return {m.layer_number: m for m in model.modules() if isinstance(m, TopKRouter) and m.layer_number}


def observe(model: torch.nn.Module) -> dict[str, Any]:
    tokens = torch.randint(64, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH).expand_as(tokens)

    def forward() -> torch.Tensor:
        return model(tokens, positions, attention_mask=None, labels=tokens).mean()

    routers = routers_of(model)
    chosen: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda _module, _inputs, output: chosen.update({layer: output[1]})

    hooks = [router.register_forward_hook(keep(layer)) for layer, router in routers.items()]
    loss_before = forward().item()
    recorder = RouterRecorder(model, num_recorded=10)
    loss = forward()
    loss.backward()
    first = recorder.drain()
    for hook in hooks:
        hook.remove()
    model.eval()
    forward()
    model.train()
    with torch.no_grad():
        forward()
    not_trained = recorder.drain()
    config = next(iter(routers.values())).config
    config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    forward().backward()
    config.recompute_granularity = None
    recomputed = recorder.drain()
    recorder.detach()
    recorder.detach()
    forward().backward()
    return {
        "layers": recorder.layers,
        "loss_before": loss_before,
        "loss": loss.item(),
        "shapes": [list(ids.shape) for forwards in first.values() for ids in forwards],
        "same_set": all(
            torch.equal(
                torch.zeros_like(chosen[layer]).scatter(1, ids[0].reshape(-1, 10)[:, :8].long(), True), chosen[layer]
            )
            for layer, ids in first.items()
        ),
        "groups": {
            layer: int(max((ids[0] // 32).flatten(0, 1)[t].unique().numel() for t in range(SEQUENCES * LENGTH)))
            for layer, ids in first.items()
        },
        "not_trained": sum(len(forwards) for forwards in not_trained.values()),
        "recomputed": {layer: len(forwards) for layer, forwards in recomputed.items()},
        "recomputed_equal": all(torch.equal(recomputed[layer][0], ids[0]) for layer, ids in first.items()),
        "after_detach": sum(len(forwards) for forwards in recorder.drain().values()),
        "wrapped": [layer for layer, router in routers.items() if "routing" in vars(router)],
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("recorder")
    run_ranks(observe_stock_routers, 1, (str(folder),), timedelta(minutes=2))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}


both = pytest.mark.parametrize("name", [pytest.param("qwen3_30b_a3b", marks=pytest.mark.slow), "deepseek_v3"])


@both
def test_first_topk_are_the_experts_the_router_chose(seen, name: str) -> None:
    assert seen[name]["same_set"]


@both
def test_every_moe_layer_gives_one_entry_a_forward(seen, name: str) -> None:
    assert seen[name]["layers"] == ([1, 2, 3] if name == "qwen3_30b_a3b" else [2, 3])
    assert seen[name]["shapes"] == [[LENGTH, SEQUENCES, 10]] * len(seen[name]["layers"])


@both
def test_recording_leaves_the_loss_to_the_bit(seen, name: str) -> None:
    assert seen[name]["loss"] == seen[name]["loss_before"]


@both
def test_evaluation_and_forwards_without_gradient_are_not_recorded(seen, name: str) -> None:
    assert seen[name]["not_trained"] == 0


@both
def test_activation_recomputation_records_once(seen, name: str) -> None:
    assert set(seen[name]["recomputed"].values()) == {1}
    assert seen[name]["recomputed_equal"]


@both
def test_detach_gives_the_routers_back(seen, name: str) -> None:
    assert seen[name]["after_detach"] == 0
    assert seen[name]["wrapped"] == []


def test_all_ten_recorded_experts_obey_the_group_limit(seen) -> None:
    assert all(groups <= 4 for groups in seen["deepseek_v3"]["groups"].values())


def routing_map(ids: list[list[int]], num_experts: int) -> torch.Tensor:
    return torch.zeros(len(ids), num_experts, dtype=torch.bool).scatter(1, torch.tensor(ids), True)


def test_experts_are_ranked_by_falling_score() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.4, 0.7, 0.2]])
    ids = ranked_experts(scores, routing_map([[1, 3]], 5), topk=2, num_recorded=4, layer=1)
    assert ids.tolist() == [[1, 3, 2, 4]]


def test_among_equal_scores_the_routers_choice_comes_first() -> None:
    scores = torch.tensor([[1.0, 0.5, 0.5, 0.5]])
    ids = ranked_experts(scores, routing_map([[0, 3]], 4), topk=2, num_recorded=3, layer=1)
    assert ids[0, :2].tolist() == [0, 3]
    assert ids[0, 2] in (1, 2)


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ([0.9, 0.8, 0.1], [0, 2]),
        ([0.9, float("-inf"), float("-inf")], [0, 1]),
        ([float("nan"), 0.8, 0.1], [0, 1]),
        ([0.9, 0.8, 0.1], [0, 0]),
    ],
    ids=["not the best", "outside the groups", "nan", "too few"],
)
def test_a_choice_that_the_scores_do_not_explain_is_refused(scores: list[float], chosen: list[int]) -> None:
    with pytest.raises(RuntimeError, match="layer 4: the recorder's best 2 experts differ from the router's choice"):
        ranked_experts(torch.tensor([scores]), routing_map([chosen], 3), topk=2, num_recorded=2, layer=4)


def test_a_model_without_routers_is_refused() -> None:
    with pytest.raises(ValueError, match="no TopKRouter"):
        RouterRecorder(torch.nn.Linear(2, 2))
