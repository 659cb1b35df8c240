"""Whatever a system does on the way, the layer gives the stock dispatcher's output and gradients, bit for bit."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hiermoe.planner.counts import count_routing
from hiermoe.planner.traffic import exact_traffic
from hiermoe.topology.placement import Placement
from tests.dispatch.contract import IDENTITY, MOVED, STOCK, STOCK_WITHOUT_DROPPED, Outcome, numbers_fit_fp32
from tests.dispatch.routings import (
    NOT_CHOSEN,
    PLACED,
    Answer,
    exact_answer,
    kept_pairs,
    numbers_for,
    placement_of,
    routing_of,
)
from tests.dispatch.worlds import (
    NEEDS_GPU,
    NEEDS_LEVELS,
    SYSTEMS,
    TRANSPORTS,
    WORLDS,
    World,
    cases_of,
    same_transport,
    transport_of,
)

LOSSY = {"tutel_2dh_padded_cf1"}

Results = Callable[[World], list[dict[Any, Any]]]

pytestmark = pytest.mark.xdist_group("contract")
in_every_world = pytest.mark.parametrize("world", WORLDS, ids=str)
for_every_system = pytest.mark.parametrize(
    ("world", "system"), [(w, s) for w in WORLDS for s in TRANSPORTS if w.runs(s)], ids=str
)
for_every_lossless_system = pytest.mark.parametrize(
    ("world", "system"), [(w, s) for w in WORLDS for s in TRANSPORTS if w.runs(s) and s not in LOSSY], ids=str
)


def gathered(results: list[dict[Any, Any]], system: str, case: str, where: str, placement: Placement) -> Answer:
    """One run of all ranks, its weight gradients by logical expert."""
    outcomes: list[Outcome] = [result[system, case, where] for result in results]
    by_slot = torch.cat([outcome.weight_gradient_LMM for outcome in outcomes])
    return Answer(
        [outcome.output for outcome in outcomes],
        [outcome.x_gradient for outcome in outcomes],
        [outcome.probs_gradient for outcome in outcomes],
        by_slot[placement.slot_E],
    )


def different(got: Answer, expected: Answer) -> list[str]:
    """Names of the tensors that are not equal to the bit."""
    parts: Iterator[tuple[str, Tensor, Tensor]] = (
        (f"{name} of rank {rank}", mine, theirs)
        for name in ("output", "x_gradient", "probs_gradient")
        for rank, (mine, theirs) in enumerate(zip(getattr(got, name), getattr(expected, name), strict=True))
    )
    wrong = [name for name, mine, theirs in parts if not torch.equal(mine, theirs.to(mine.dtype))]
    for expert, (mine, theirs) in enumerate(zip(got.weight_gradient_EMM, expected.weight_gradient_EMM, strict=True)):
        if not torch.equal(mine, theirs.to(mine.dtype)):
            wrong.append(f"weight_gradient of expert {expert}")
    return wrong


def compare(results: list[dict[Any, Any]], world: World, system: str, reference: str, moved: bool = False) -> None:
    wrong = {}
    for case in set(cases_of(world)) & set(PLACED) if moved else cases_of(world):
        num_experts = routing_of(case, world.num_ranks).num_experts
        identity = Placement.identity(num_experts)
        placement = placement_of(case, num_experts) if moved else identity
        got = gathered(results, system, case, MOVED if moved else IDENTITY, placement)
        wrong[case] = different(got, gathered(results, reference, case, IDENTITY, identity))
    assert not any(wrong.values()), {case: names for case, names in wrong.items() if names}


@pytest.mark.parametrize(("world", "case"), [(w, c) for w in WORLDS for c in cases_of(w)], ids=str)
def test_the_stock_dispatcher_gives_the_exact_answer_because_nothing_rounds(
    contract_results: Results, world: World, case: str
) -> None:
    routing = routing_of(case, world.num_ranks)
    numbers = numbers_for(routing)
    identity = Placement.identity(routing.num_experts)
    for reference, kept in ((STOCK, None), (STOCK_WITHOUT_DROPPED, kept_pairs(routing, 1.0))):
        answer = exact_answer(routing, numbers, kept)
        assert numbers_fit_fp32(answer)
        assert not different(gathered(contract_results(world), reference, case, IDENTITY, identity), answer)


@pytest.mark.parametrize("system", SYSTEMS)
def test_systems_that_move_tokens_in_the_same_way_are_run_once(system: str) -> None:
    mine, run = transport_of(system), transport_of(same_transport(system))
    looks = {"name", "label", "color", "placement_label", "placement_color", "entrant"}
    assert mine.model_dump(exclude=looks) == run.model_dump(exclude=looks)
    for world in WORLDS:
        assert world.runs(system) == world.runs(run.name)
        if world.runs(system):
            hierarchy = world.cluster.hierarchy
            assert mine.build_schemes(hierarchy) == run.build_schemes(hierarchy)


@for_every_lossless_system
def test_layer_output_and_gradients_equal_the_stock_dispatchers_bit_for_bit(
    contract_results: Results, world: World, system: str
) -> None:
    compare(contract_results(world), world, system, STOCK)


@for_every_lossless_system
def test_moved_experts_change_no_bit(contract_results: Results, world: World, system: str) -> None:
    if transport_of(system).executor != "staged":
        assert (system, PLACED[0], MOVED) not in contract_results(world)[0]
        return
    compare(contract_results(world), world, system, STOCK, moved=True)


@in_every_world
@pytest.mark.parametrize("system", sorted(LOSSY))
@pytest.mark.parametrize("moved", [False, True])
def test_a_lossy_system_gives_the_stock_dispatchers_bits_for_the_pairs_it_keeps(
    contract_results: Results, world: World, system: str, moved: bool
) -> None:
    compare(contract_results(world), world, system, STOCK_WITHOUT_DROPPED, moved)


@for_every_system
def test_only_lossy_systems_drop_pairs_and_as_many_as_the_planner_says(
    contract_results: Results, world: World, system: str
) -> None:
    (*_, scheme) = transport_of(system).build_schemes(world.cluster.hierarchy)
    assert scheme.lossy == (system in LOSSY)
    dropped_somewhere = False
    for case in cases_of(world):
        routing = routing_of(case, world.num_ranks)
        in_plans = {result[system, case, IDENTITY].dropped for result in contract_results(world)}
        naive = 0
        if scheme.lossy:
            kept = kept_pairs(routing, 1.0)
            naive = sum(ids.numel() for ids in routing.ids) - sum(int(mine.sum()) for mine in kept)
            counts = count_routing(routing.step, Placement.identity(routing.num_experts), world.cluster.hierarchy)
            assert exact_traffic(scheme, counts, world.cluster.hierarchy).dropped_pairs == naive, case
        assert in_plans == {naive}, case
        dropped_somewhere |= naive > 0
    assert dropped_somewhere == scheme.lossy


@in_every_world
def test_a_system_that_needs_more_levels_or_a_gpu_is_not_applicable_on_every_rank(
    contract_results: Results, world: World
) -> None:
    for result in contract_results(world):
        reasons = {name: value for name, value in result.items() if isinstance(name, str)}
        assert set(reasons) == {name for name in TRANSPORTS if not world.runs(name)}
        for name, reason in reasons.items():
            expected = "needs a GPU" if name in NEEDS_GPU else f"dimension={NEEDS_LEVELS[name]} is outside"
            assert expected in reason


@in_every_world
def test_cases_are_what_their_names_say(world: World) -> None:
    ranks = world.num_ranks

    def received(case: str) -> Tensor:
        routing = routing_of(case, ranks)
        return sum((routing.chosen_TE(rank).sum(0) for rank in range(ranks)), torch.zeros(()))

    def by_rank(case: str) -> list[int]:
        return received(case).view(ranks, -1).sum(1).tolist()

    assert received("one_hot_expert").max() == 7 * ranks
    assert (received("empty_experts") == 0).sum() >= ranks
    assert by_rank("rank_that_receives_nothing")[2] == 0
    assert not any(by_rank("node_that_receives_nothing")[ranks // 2 :])
    assert sum(count > 0 for count in by_rank("top_1_all_to_one")) == 1
    assert received("all_experts").unique().numel() == 1
    assert len({len(ids) for ids in routing_of("ragged", ranks).ids}) > 3
    assert [len(ids) for ids in routing_of("rank_without_tokens", ranks).ids].count(0) == 1
    assert routing_of("top_1", ranks).topk == 1
    assert routing_of("one_expert_a_rank", ranks).num_experts == ranks
    assert (routing_of("zipf", ranks).probs_TE(0) == NOT_CHOSEN).any()
    for case in PLACED:
        placement = placement_of(case, routing_of(case, ranks).num_experts)
        assert (placement.rank_of(ranks) != Placement.identity(placement.num_experts).rank_of(ranks)).sum() >= 2
