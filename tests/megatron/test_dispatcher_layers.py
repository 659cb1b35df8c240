"""Megatron's real MoE layer, with routers, shared expert and balancing loss, under every system in three precisions.

The layers hold the same weights, rounded to bf16, and get the same inputs, rounded to bf16. In fp64 a system may differ
from the stock dispatcher by the order of sums alone. In fp32 and bf16 its error against fp64 may be at most twice the
stock dispatcher's: both add the same K products and round as often or less, so their errors are of one size; two is
room for chance.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from hiermoe.megatron.standins import cpu

cpu.expect_fallbacks()

from hiermoe.megatron.attach import attach, detach, moe_layers  # noqa: E402
from hiermoe.ranks.launch import run_ranks  # noqa: E402
from tests.dispatch import models  # noqa: E402
from tests.dispatch.worlds import (  # noqa: E402
    DEADLINE,
    SYSTEMS,
    TIMEOUT,
    TRANSPORTS,
    World,
    same_transport,
    start_megatron,
    transport_of,
)

WORLD = World((2, 4, 8))
HIDDEN = 64
TOKENS = (4, 2)  # of a rank: so few that capacity factor 1 has room for all of an expert's, and nothing is dropped
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
STOCK = "stock"
RUNNING = [system for system in SYSTEMS if WORLD.runs(system)]
Seen = dict[Any, Any]
Tensors = dict[str, Tensor]


def observe(rank: int, kind: str) -> Seen:
    start_megatron(WORLD.num_ranks)
    seen: Seen = {}
    layers = {(kind, precision): layer for precision, layer in _same_weights(kind).items()}
    stock = {key: _run(layer, rank) for key, layer in layers.items()}
    amplitude = {key: _amplitude(layer, rank) for key, layer in layers.items()}
    for kind, precision in layers:
        exact, exact_facts = stock[kind, "fp64"]
        tensors, facts = stock[kind, precision]
        seen["routed alike", kind, precision] = torch.equal(facts["map"], exact_facts["map"])
        seen["size", kind, precision] = _squares(exact)
        seen["error", kind, precision, STOCK] = _squares(_minus(tensors, exact))
        seen["balancing", kind] = float(exact_facts["balancing"])
        seen["groups", kind] = int(exact_facts["map"].view(8, 8, 4).any(-1).sum(1).max())
        seen["bias chooses", kind] = _bias_chooses(layers[kind, "fp64"], rank)
    together = torch.nn.ModuleList(layers.values())
    for system in TRANSPORTS:
        if not WORLD.runs(system):
            continue
        attach(together, transport_of(system), WORLD.cluster)
        for (kind, precision), layer in layers.items():
            tensors, facts = _run(layer, rank)
            plan = getattr(layer.token_dispatcher, "plan", None)
            exact, theirs = stock[kind, "fp64"][0], stock[kind, precision]
            seen["error", kind, precision, system] = _squares(_minus(tensors, exact))
            difference = (tensors["output"] - theirs[0]["output"]).abs()
            seen["beyond", kind, precision, system] = float((difference / amplitude[kind, precision]).max())
            seen["same facts", kind, precision, system] = all(
                torch.equal(facts[name], theirs[1][name]) for name in facts
            )
            seen["dropped", kind, precision, system] = plan.traffic.dropped_pairs if plan else 0
        detach(together)
    return seen


def _same_weights(kind: str) -> dict[str, Any]:
    layers = {}
    for precision, dtype in DTYPES.items():
        gpt = models.build(models.cut_down(kind, hidden=HIDDEN), WORLD.num_ranks, dtype)
        layers[precision] = moe_layers(gpt)[0]
        layers[precision].train()
    for parameters in zip(*(layer.parameters() for layer in layers.values()), strict=True):
        for parameter in parameters:
            parameter.data.copy_(parameters[0].data.bfloat16())
    return layers


def _inputs(layer: Any, rank: int) -> tuple[Tensor, Tensor]:
    dtype = next(layer.experts.parameters()).dtype
    generator = torch.Generator().manual_seed(rank)
    x, gradient = (torch.randn(*TOKENS, HIDDEN, generator=generator).bfloat16().to(dtype) for _ in range(2))
    return x, gradient


def _run(layer: Any, rank: int) -> tuple[Tensors, Tensors]:
    """Output and gradients in fp64; and what does not pass through a dispatcher."""
    from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker

    models.forget_loads(layer)
    clear_aux_losses_tracker()
    layer.zero_grad()
    x, gradient = _inputs(layer, rank)
    x.requires_grad_()
    maps: list[Tensor] = []
    hook = layer.router.register_forward_hook(lambda _module, _inputs, output: maps.append(output[1]))
    output, _ = layer(x)
    hook.remove()
    output.backward(gradient)
    tensors = {"output": output.detach(), "input gradient": x.grad}
    for name, parameter in layer.named_parameters():
        part = "router" if "router" in name else "shared expert" if "shared" in name else "experts"
        tensors[f"{part} gradient: {name}"] = parameter.grad
    balancing = sum(float(entry["values"].sum()) for entry in get_moe_layer_wise_logging_tracker().values())
    facts = {"map": maps[0], "balancing": torch.tensor(balancing, dtype=torch.float64)}
    if layer.router.local_tokens_per_expert is not None:
        facts["load"] = layer.router.local_tokens_per_expert.clone()
    return {name: tensor.double().clone() for name, tensor in tensors.items()}, facts


def _amplitude(layer: Any, rank: int) -> Tensor:
    """Sum of the absolute values of what is added up to the output, element by element."""
    hooks = [
        layer.experts.register_forward_hook(lambda _module, _inputs, output: (output[0].abs(), output[1])),
        *(
            [layer.shared_experts.register_forward_hook(lambda _module, _inputs, output: output.abs())]
            if layer.shared_experts is not None
            else []
        ),
    ]
    with torch.no_grad():
        output, _ = layer(_inputs(layer, rank)[0])
    for hook in hooks:
        hook.remove()
    return output.double()


def _minus(a: Tensors, b: Tensors) -> Tensors:
    return {name: a[name] - b[name] for name in b}


def _squares(tensors: Tensors) -> dict[str, float]:
    """Sum of squares of each part."""
    sums: dict[str, float] = {}
    for name, tensor in tensors.items():
        part = name.split(":")[0]
        sums[part] = sums.get(part, 0.0) + float(tensor.pow(2).sum())
    return sums


def _bias_chooses(layer: Any, rank: int) -> bool:
    """Whether the expert bias changes which experts are chosen."""
    if layer.router.expert_bias is None:
        return False
    kept = layer.router.expert_bias.clone()
    with_bias = _run(layer, rank)[1]["map"]
    layer.router.expert_bias.zero_()
    without = _run(layer, rank)[1]["map"]
    layer.router.expert_bias.copy_(kept)
    return not torch.equal(with_bias, without)


@pytest.fixture(scope="module", params=["deepseek_v3", pytest.param("qwen3_30b_a3b", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def seen(kind: str) -> list[Seen]:
    return run_ranks(observe, WORLD.num_ranks, (kind,), TIMEOUT, deadline=DEADLINE, hosts=WORLD.hosts)


under_every_system = pytest.mark.parametrize("system", RUNNING)


def norms(seen: list[Seen], *key: str) -> dict[str, float]:
    """Root of the sum of squares over all ranks, by part."""
    return {part: sum(result[key][part] for result in seen) ** 0.5 for part in seen[0][key]}


def test_the_layers_are_what_they_are_meant_to_be(seen: list[Seen], kind: str) -> None:
    parts = {"output", "input gradient", "router gradient", "experts gradient"}
    shared = kind == "deepseek_v3"
    assert set(seen[0]["size", kind, "fp64"]) == parts | ({"shared expert gradient"} if shared else set())
    assert all(size > 0 for size in norms(seen, "size", kind, "fp64").values())
    for result in seen:
        assert result["balancing", kind] > 0
        assert all(result["routed alike", kind, precision] for precision in DTYPES)
        assert (result["groups", kind] <= 4) == shared
    assert any(result["bias chooses", kind] for result in seen) == shared
    for precision in ("fp32", "bf16"):
        assert all(error > 0 for error in norms(seen, "error", kind, precision, STOCK).values())


@under_every_system
def test_in_fp64_output_and_all_gradients_equal_the_stock_dispatchers(seen: list[Seen], kind: str, system: str) -> None:
    size, error = norms(seen, "size", kind, "fp64"), norms(seen, "error", kind, "fp64", same_transport(system))
    assert all(error[part] <= 1e-12 * size[part] for part in size), error


@under_every_system
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rounding_errors_are_at_most_twice_the_stock_dispatchers(
    seen: list[Seen], kind: str, system: str, precision: str
) -> None:
    stock = norms(seen, "error", kind, precision, STOCK)
    error = norms(seen, "error", kind, precision, same_transport(system))
    ratios = {part: error[part] / stock[part] for part in stock}
    assert all(ratio <= 2 for ratio in ratios.values()), ratios


@under_every_system
@pytest.mark.parametrize("precision", DTYPES)
def test_outputs_differ_by_the_rounding_of_a_sum_of_k_products(
    seen: list[Seen], kind: str, system: str, precision: str
) -> None:
    """K products and a shared expert's output: K additions, each wrong by at most eps / 2 of the sum of absolute
    values, in this dispatcher as in the stock one; staged sums are rounded once more a stage."""
    roundings = 8 + WORLD.cluster.hierarchy.depth
    bound = 2 * roundings * torch.finfo(DTYPES[precision]).eps / 2
    beyond = max(result["beyond", kind, precision, same_transport(system)] for result in seen)
    assert beyond <= bound


@under_every_system
@pytest.mark.parametrize("precision", DTYPES)
def test_choices_balancing_loss_and_expert_loads_are_the_same_and_nothing_is_dropped(
    seen: list[Seen], kind: str, system: str, precision: str
) -> None:
    for result in seen:
        assert result["same facts", kind, precision, same_transport(system)]
        assert result["dropped", kind, precision, same_transport(system)] == 0
