"""A model gets a system and gives it back; settings that the dispatchers do not support are refused by name."""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hiermoe.megatron.standins import cpu

cpu.expect_fallbacks()

from hiermoe.megatron.adapter import StagedTokenDispatcher  # noqa: E402
from hiermoe.megatron.attach import attach, check_supported, detach, moe_layers, with_system  # noqa: E402
from hiermoe.megatron.versions import class_of  # noqa: E402
from hiermoe.policies.system import SystemConfig  # noqa: E402
from hiermoe.ranks.launch import run_ranks  # noqa: E402
from hiermoe.topology.placement import Placement  # noqa: E402
from hiermoe.topology.placement_files import write_placements  # noqa: E402
from tests.dispatch import models  # noqa: E402
from tests.dispatch.worlds import DEADLINE, TIMEOUT, World, start_megatron  # noqa: E402

WORLD = World((2, 4))
Seen = dict[Any, Any]  # name, or name and system -> what a rank saw
ATTACHED = ("hd2", "hd_moe", "tutel_2dh", "megatron_reordered")


def observe(rank: int) -> Seen:
    start_megatron(WORLD.num_ranks)
    seen: Seen = {}
    model = models.cut_down("deepseek_v3", moe_layers=2)
    gpt = models.build(model, WORLD.num_ranks)
    _attach_and_detach(gpt, rank, seen)
    _refusals(gpt, rank, seen)
    _wrapped(gpt, rank, seen)
    _from_spec(gpt, model, rank, seen)
    _overlapped_shared_expert(model, rank, seen)
    _placed(gpt, rank, seen)
    return seen


def _attach_and_detach(gpt: torch.nn.Module, rank: int, seen: Seen) -> None:
    stock = [layer.token_dispatcher for layer in moe_layers(gpt)]
    loss, gradients = models.step(gpt, rank)
    seen["errors"] = {}
    for system in ATTACHED:
        attach(gpt, system, WORLD.cluster)
        seen["types", system] = [type(layer.token_dispatcher).__name__ for layer in moe_layers(gpt)]
        seen["separate", system] = len({id(layer.token_dispatcher) for layer in moe_layers(gpt)})
        attached_loss, attached = models.step(gpt, rank)
        seen["errors"][system] = abs(attached_loss - loss), models.largest_difference(attached, gradients)
        detach(gpt)
    detach(gpt)
    seen["given_back"] = [layer.token_dispatcher is x for layer, x in zip(moe_layers(gpt), stock, strict=True)]
    loss_after, after = models.step(gpt, rank)
    seen["same_bits_after"] = loss_after == loss and all(torch.equal(after[n], gradients[n]) for n in gradients)


def _placed(gpt: torch.nn.Module, rank: int, seen: Seen) -> None:
    """Experts begin where a file says."""
    loss, gradients = models.step(gpt, rank)
    experts = moe_layers(gpt)[0].config.num_moe_experts or 0
    numbers = [layer.layer_number or 0 for layer in moe_layers(gpt)]
    orders = {number: torch.randperm(experts, generator=torch.Generator().manual_seed(number)) for number in numbers}
    with TemporaryDirectory() as folder:
        path, _ = write_placements(Path(folder), {number: Placement(order) for number, order in orders.items()})
        placement = attach(gpt, "hd2", WORLD.cluster, placements=path)
        seen["placed"] = [
            torch.equal(x.dispatcher.placement.expert_at_S, orders[x.number]) for x in placement.layers
        ] + [placement.step(None) == []]
        seen["placed_error"] = abs(models.step(gpt, rank)[0] - loss)
        placement.go_home(None)
        detach(gpt)
        after_loss, after = models.step(gpt, rank)
        seen["placed_and_back"] = after_loss == loss and all(torch.equal(after[n], gradients[n]) for n in gradients)
        seen["not_placed"] = []
        for system in ("megatron_reordered", "hd2"):
            with pytest.raises(ValueError) as caught:
                attach(gpt, system, WORLD.cluster, placements=path)
            seen["not_placed"].append(str(caught.value))
            write_placements(Path(folder), {1: Placement.identity(experts)})


def _refusals(gpt: torch.nn.Module, rank: int, seen: Seen) -> None:
    attach(gpt, "hd2", WORLD.cluster)
    inside = [layer.token_dispatcher for layer in moe_layers(gpt)]
    seen["twice"] = _error(gpt, "hd2")
    seen["twice_changes_nothing"] = all(
        layer.token_dispatcher is x for layer, x in zip(moe_layers(gpt), inside, strict=True)
    )
    detach(gpt)
    stock_that_moves = SystemConfig.named("smartmoe").model_copy(update={"name": "moves", "executor": "stock"})
    for system in (
        "megatron_flex",
        stock_that_moves,
        "hd3",
        "no_such_system",
        "ultraep",
        "eplb",
        "placemoe",
        "hiermoe_copies",
    ):
        seen["refused", system if isinstance(system, str) else system.name] = _error(gpt, system)
        attach(gpt, "hd1", WORLD.cluster)  # what was refused left nothing behind
        detach(gpt)
    moe_layers(gpt)[1].config.moe_expert_capacity_factor = 1.0
    seen["refused", "capacity"] = _error(gpt, "hd1")
    moe_layers(gpt)[1].config.moe_expert_capacity_factor = None


def _error(gpt: torch.nn.Module, system: str | SystemConfig) -> str:
    try:
        attach(gpt, system, WORLD.cluster)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _wrapped(gpt: torch.nn.Module, rank: int, seen: Seen) -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    with cpu.cuda_means_cpu():
        ddp = DistributedDataParallel(gpt.config, DistributedDataParallelConfig(overlap_grad_reduce=False), gpt)  # type: ignore[arg-type]
    both: dict[str, Any] = {"ddp": ddp, "chunks": [ddp]}
    for name, wrapped in both.items():
        attach(wrapped, "hd2", WORLD.cluster)
        seen["wrapped", name] = [isinstance(x.token_dispatcher, StagedTokenDispatcher) for x in moe_layers(gpt)]
        detach(wrapped)


def _from_spec(gpt: torch.nn.Module, model: Any, rank: int, seen: Seen) -> None:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    kept: list[Any] = []

    def change(spec: Any) -> Any:
        kept.append(spec)
        return with_system(spec, "hd2", WORLD.cluster)

    built = models.build(model, WORLD.num_ranks, with_spec=change)
    seen["spec_kept"] = [class_of(spec.submodules.mlp) is MoELayer for spec in kept[0].layer_specs]
    seen["spec_types"] = [type(layer.token_dispatcher).__name__ for layer in moe_layers(built)]
    stock = models.build(model, WORLD.num_ranks)
    loss, gradients = models.step(stock, rank)
    built_loss, from_spec = models.step(built, rank)
    seen["from_spec"] = abs(loss - built_loss), models.largest_difference(from_spec, gradients)


def _overlapped_shared_expert(model: Any, rank: int, seen: Seen) -> None:
    plain = models.build(model, WORLD.num_ranks)
    gpt = models.build(model, WORLD.num_ranks, moe_shared_expert_overlap=True)
    plain_loss, plain_gradients = models.step(plain, rank)
    loss, gradients = models.step(gpt, rank)
    stock: list[Any] = [layer.token_dispatcher for layer in moe_layers(gpt)]
    seen["overlap_is_on"] = [dispatcher.shared_experts is not None for dispatcher in stock]
    seen["overlap", "stock"] = abs(loss - plain_loss), models.largest_difference(gradients, plain_gradients)
    for system in ATTACHED:
        attach(gpt, system, WORLD.cluster)
        attached_loss, attached = models.step(gpt, rank)
        seen["overlap", system] = abs(attached_loss - loss), models.largest_difference(attached, gradients)
        detach(gpt)


@pytest.fixture(scope="module")
def seen() -> list[Seen]:
    return run_ranks(observe, WORLD.num_ranks, (), TIMEOUT, deadline=DEADLINE, hosts=WORLD.hosts)


@pytest.mark.parametrize("system", ATTACHED)
def test_an_attached_system_changes_nothing_but_roundings(seen: list[Seen], system: str) -> None:
    for result in seen:
        assert max(result["errors"][system]) < 1e-12
        kind = "ReorderedTokenDispatcher" if system == "megatron_reordered" else "StagedTokenDispatcher"
        assert result["types", system] == [kind, kind]
        assert result["separate", system] == 2


def test_detach_gives_the_stock_dispatchers_and_their_bits_back(seen: list[Seen]) -> None:
    assert all(result["given_back"] == [True, True] for result in seen)
    assert all(result["same_bits_after"] for result in seen)


def test_attaching_twice_is_refused_and_changes_nothing(seen: list[Seen]) -> None:
    for result in seen:
        assert result["twice"] == "RuntimeError: a system is attached already: call detach() first"
        assert result["twice_changes_nothing"]


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ("megatron_flex", "NotApplicable: Megatron's flex dispatcher needs a GPU"),
        ("moves", "ValueError: system=moves: only the staged executor can have experts placed elsewhere"),
        ("hd3", "NotApplicable: dimension=3 is outside 1..2"),
        ("no_such_system", "ValueError: system=no_such_system is unknown"),
        ("ultraep", "NotApplicable: system ultraep keeps experts in more than one place: it is simulated and replayed"),
        ("eplb", "NotApplicable: system eplb keeps experts in more than one place"),
        ("placemoe", "NotApplicable: system placemoe keeps experts in more than one place"),
        ("hiermoe_copies", "NotApplicable: system hiermoe_copies keeps experts in more than one place"),
        ("capacity", "ValueError: moe_expert_capacity_factor=1.0 is not supported"),
    ],
)
def test_what_cannot_be_attached_is_refused_on_every_rank_and_leaves_nothing_behind(
    seen: list[Seen], system: str, message: str
) -> None:
    assert all(result["refused", system].startswith(message) for result in seen)


def test_experts_begin_where_a_file_says_and_that_changes_nothing_but_roundings(seen: list[Seen]) -> None:
    for result in seen:
        assert result["placed"] == [True, True, True]
        assert result["placed_error"] < 1e-12
        assert result["placed_and_back"]
        assert result["not_placed"][0] == (
            "system megatron_reordered leaves experts where stock Megatron has them: no placements="
        )
        assert result["not_placed"][1].endswith("has 1 layers, the model has experts in layers [2, 3] too")


@pytest.mark.parametrize("how", ["ddp", "chunks"])
def test_layers_are_found_in_wrapped_models_and_in_lists_of_chunks(seen: list[Seen], how: str) -> None:
    assert all(result["wrapped", how] == [True, True] for result in seen)


def test_a_model_built_from_a_changed_spec_works_and_the_spec_is_left_alone(seen: list[Seen]) -> None:
    for result in seen:
        assert result["spec_types"] == ["StagedTokenDispatcher"] * 2
        assert result["spec_kept"] == [False, True, True]  # the first layer has no experts
        assert max(result["from_spec"]) < 1e-12


@pytest.mark.parametrize("system", ["stock", *ATTACHED])
def test_an_overlapped_shared_expert_gives_the_same_numbers(seen: list[Seen], system: str) -> None:
    for result in seen:
        assert result["overlap_is_on"] == [True, True]
        assert max(result["overlap", system]) < 1e-12


def settings(**changes: Any) -> Any:
    supported = {
        "expert_tensor_parallel_size": None,
        "moe_token_dispatcher_type": "alltoall",
        "moe_expert_capacity_factor": None,
        "moe_pad_expert_input_to_capacity": False,
        "moe_router_padding_for_quantization": False,
        "cuda_graph_impl": "none",
        "overlap_moe_expert_parallel_comm": False,
        "fp8_param": False,
    }
    return SimpleNamespace(**{**supported, **changes})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("expert_tensor_parallel_size", 2),
        ("moe_token_dispatcher_type", "allgather"),
        ("moe_token_dispatcher_type", "flex"),
        ("moe_expert_capacity_factor", 1.25),
        ("moe_pad_expert_input_to_capacity", True),
        ("moe_router_padding_for_quantization", True),
        ("cuda_graph_impl", "local"),
        ("overlap_moe_expert_parallel_comm", True),
        ("fp8_param", True),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(name: str, value: Any) -> None:
    check_supported(settings())
    with pytest.raises(ValueError, match=f"^{name}={value} is not supported"):
        check_supported(settings(**{name: value}))


def test_settings_that_an_older_megatron_lacks_are_no_error() -> None:
    config = settings()
    for name in ("expert_tensor_parallel_size", "moe_router_padding_for_quantization", "cuda_graph_impl"):
        delattr(config, name)
    check_supported(config)


def test_a_model_or_a_spec_without_experts_is_refused() -> None:
    for function in (moe_layers, detach, lambda model: attach(model, "hd1", "a6000_4x8")):
        with pytest.raises(ValueError, match="the model has no MoE layer"):
            function(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    spec = SimpleNamespace(submodules=SimpleNamespace(mlp=SimpleNamespace(module=torch.nn.Linear)))
    with pytest.raises(ValueError, match="the spec has no MoE layer"):
        with_system(spec, "hd1", "a6000_4x8")
