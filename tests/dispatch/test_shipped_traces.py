"""Recorded routing on real ranks: HD2 sends each token once to each node that needs it, and metadata stays small."""

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch

from hiermoe.planner.bounds import fixed_placement_rows
from hiermoe.planner.counts import RoutingCounts, count_routing
from hiermoe.ranks.launch import run_ranks
from hiermoe.records.project import SHIPPED
from hiermoe.routing.trace import RecordedRouting, RoutingTrace
from hiermoe.topology.placement import Placement
from tests.dispatch import contract
from tests.dispatch.routings import Routing, exact_answer, numbers_for
from tests.dispatch.worlds import (
    DEADLINE,
    TIMEOUT,
    TRANSPORTS,
    World,
    layer_config,
    only_expert_parallel,
    same_transport,
    stock_dispatcher,
    transport_of,
)

TRACES = {"deepseek_v3_e256_late": 256, "qwen3_30b_a3b_e128_late": 128}
TOPK, HIDDEN = 8, 2048
LARGEST_SHARE = 0.03  # of metadata in payload, at M = 2048 in bf16 with fp32 weights
SMALL, SMALL_TOKENS = World((2, 4, 8)), 64
FULL, FULL_TOKENS = World((4, 8, 16, 32)), 128
DEDUPLICATING = ("hd1", "hd2", "hd3", "hd4", "hd_moe")
Sent = dict[Any, Counter[tuple[str, str]]]  # trace and system -> bytes by stage and kind, over all ranks


@cache
def recorded(trace: str, world: World, tokens: int) -> RecordedRouting:
    full = RoutingTrace.load(SHIPPED / "results" / "traces" / f"{trace}.trace")
    return RecordedRouting(full.reshard(world.num_ranks, tokens), 0, TOPK)


def counts_of(trace: str, world: World, tokens: int) -> RoutingCounts:
    step = recorded(trace, world, tokens).step(0)
    return count_routing(step, Placement.identity(TRACES[trace]), world.cluster.hierarchy)


def dispatch_rows(rank: int, world: World, tokens: int, ids: dict[str, torch.Tensor]) -> Sent:
    """Dispatch and combine hidden states of full width; what this rank sent, by stage and kind."""
    from hiermoe.dispatch.dispatcher import dispatch_context
    from hiermoe.dispatch.interposer import Interposer
    from hiermoe.megatron.attach import new_dispatcher

    groups = only_expert_parallel()
    sent: Sent = {}
    for system in (name for name in DEDUPLICATING if world.runs(name)):
        context = None
        for trace, ids_GTK in ids.items():
            config = layer_config(TRACES[trace], TOPK, HIDDEN, world.num_ranks, bf16=True)
            context = context or dispatch_context(transport_of(system), world.cluster, groups.ep)
            stock = stock_dispatcher(config, groups)
            dispatcher: Any = new_dispatcher(transport_of(system), stock, config, groups, context)
            chosen_TE = torch.zeros(tokens, TRACES[trace], dtype=torch.bool).scatter(1, ids_GTK[rank], True)
            x = torch.ones(tokens, 1, HIDDEN, dtype=torch.bfloat16)
            with torch.no_grad(), Interposer() as interposer:
                rows, weights = dispatcher.dispatch_preprocess(x, chosen_TE, chosen_TE / TOPK)
                rows, weights = dispatcher.token_dispatch(rows, weights)
                rows, per_expert, weights = dispatcher.dispatch_postprocess(rows, weights)
                assert int(per_expert.sum()) == len(rows)
                assert weights.dtype == torch.float32
                transfers = interposer.drain()
                rows = (rows * weights[:, None]).to(rows.dtype)
                output = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(rows)))
            assert torch.equal(output, x)  # K weights of 1 / K
            mine = sent[trace, system] = Counter()
            for transfer in transfers:
                mine[transfer.stage, transfer.kind] += sum(transfer.sent_bytes)
    return sent


def over_all_ranks(world: World, tokens: int) -> Sent:
    ids = {
        trace: recorded(trace, world, tokens).step(0).expert_ids_NK.view(world.num_ranks, tokens, TOPK)
        for trace in TRACES
    }
    results = run_ranks(
        dispatch_rows, world.num_ranks, (world, tokens, ids), TIMEOUT, deadline=DEADLINE, hosts=world.hosts
    )
    return {key: sum((result[key] for result in results), Counter()) for key in results[0]}


@pytest.fixture(scope="module", params=[SMALL, pytest.param(FULL, marks=pytest.mark.slow)], ids=str)
def world(request: pytest.FixtureRequest) -> World:
    return request.param


@pytest.fixture(scope="module")
def sent(world: World) -> Sent:
    return over_all_ranks(world, tokens_of(world))


def tokens_of(world: World) -> int:
    return SMALL_TOKENS if world == SMALL else FULL_TOKENS


for_both_traces = pytest.mark.parametrize("trace", TRACES)


@for_both_traces
def test_hd2_sends_a_token_once_to_each_node_that_needs_it(sent: Sent, world: World, trace: str) -> None:
    bound = fixed_placement_rows(counts_of(trace, world, tokens_of(world)), level=1)
    assert sent[trace, "hd2"]["1:inter1", "payload"] == bound * HIDDEN * 2
    pairs = world.num_ranks * tokens_of(world) * TOPK
    assert bound < pairs


@for_both_traces
@pytest.mark.parametrize("system", DEDUPLICATING)
def test_metadata_are_a_small_share_of_every_stage(sent: Sent, world: World, trace: str, system: str) -> None:
    if not world.runs(system):
        assert (trace, system) not in sent
        return
    mine = sent[trace, system]
    stages = {stage for stage, kind in mine if kind == "payload"}
    assert stages
    for stage in stages:
        assert 0 < mine[stage, "metadata"] <= LARGEST_SHARE * mine[stage, "payload"], stage
    metadata = sum(amount for (_, kind), amount in mine.items() if kind == "metadata")  # counts included
    payload = sum(amount for (_, kind), amount in mine.items() if kind == "payload")
    assert metadata <= LARGEST_SHARE * payload


def run_recorded(rank: int, world: World, routings: dict[str, Routing]) -> dict[tuple[str, str], contract.Outcome]:
    """Forward and backward of linear experts under every lossless system."""
    from hiermoe.dispatch.dispatcher import dispatch_context
    from hiermoe.megatron.attach import new_dispatcher

    groups = only_expert_parallel()
    results = {}
    for name in (name for name in TRANSPORTS if world.runs(name) and name != "tutel_2dh_padded_cf1"):
        context = None
        for trace, routing in routings.items():
            config = contract.config_of(routing, world)
            context = context or dispatch_context(transport_of(name), world.cluster, groups.ep)
            dispatcher = new_dispatcher(transport_of(name), stock_dispatcher(config, groups), config, groups, context)
            results[trace, name] = contract.run(dispatcher, rank, routing)
    return results


@pytest.mark.slow
def test_recorded_routing_gives_the_exact_answer_on_32_ranks_under_every_system() -> None:
    routings = {}
    for trace, num_experts in TRACES.items():
        ids = list(recorded(trace, FULL, 64).step(0).expert_ids_NK.view(32, 64, TOPK))
        weights = torch.arange(TOPK, 0, -1).expand(64, TOPK)
        routings[trace] = Routing(ids, [weights + rank % 3 for rank in range(32)], num_experts)
    results = run_ranks(run_recorded, 32, (FULL, routings), TIMEOUT, deadline=DEADLINE, hosts=FULL.hosts)
    for trace, routing in routings.items():
        answer = exact_answer(routing, numbers_for(routing))
        assert contract.numbers_fit_fp32(answer)
        for name in {name for _, name in results[0]}:
            assert same_transport(name) == name
            outcomes = [result[trace, name] for result in results]
            for rank, outcome in enumerate(outcomes):
                assert torch.equal(outcome.output.long(), answer.output[rank]), (trace, name, rank)
                assert torch.equal(outcome.x_gradient.long(), answer.x_gradient[rank]), (trace, name, rank)
                assert torch.equal(outcome.probs_gradient.long(), answer.probs_gradient[rank]), (trace, name, rank)
            by_slot = torch.cat([outcome.weight_gradient_LMM for outcome in outcomes]).long()
            assert torch.equal(by_slot, answer.weight_gradient_EMM), (trace, name)
