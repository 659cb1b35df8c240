"""Plans and exchanges on random hierarchies, placements and routings, with threads as ranks."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from baselines.megatron import alltoall
from baselines.tutel_2dh import two_dimensional
from hiermoe.dispatch.dispatcher import Dispatcher
from hiermoe.dispatch.exchange import return_rows, send_rows
from hiermoe.dispatch.plan import DispatchContext, make_plan
from hiermoe.model import RowBytes
from hiermoe.planner.cost import choose_scheme
from hiermoe.planner.counts import count_routing
from hiermoe.planner.scheme import DispatchScheme, every_dimension, hierarchical
from hiermoe.topology.hierarchy import Hierarchy
from tests.dispatch.routings import Answer, Numbers, Routing, exact_answer, kept_pairs, numbers_for
from tests.dispatch.threads import ThreadWorld
from tests.planner.cases import Case, cases, examples, random_cluster

ROW_BYTES = 32


def candidate_sets(hierarchy: Hierarchy) -> dict[str, tuple[DispatchScheme, ...]]:
    """Every scheme that there is, each alone, and the ones that a step chooses from."""
    fixed = [hierarchical(d, dedup, hierarchy) for d in range(1, hierarchy.depth + 1) for dedup in (False, True)]
    sets: dict[str, tuple[DispatchScheme, ...]] = {s.name: (s,) for s in (*fixed, *alltoall(hierarchy))}
    sets["chosen"] = every_dimension(hierarchy)
    for intra_first in (True, False):
        for factor in (None, 0.0, 1.0, 2.5):
            schemes = two_dimensional(hierarchy, intra_first, factor)
            sets[schemes[0].name] = schemes
    return sets


def routing_from(case: Case, generator: torch.Generator) -> Routing:
    """The case's choices with different weights for every token."""
    ids = [case.step.expert_ids_NK[case.step.source_N == rank] for rank in range(case.hierarchy.num_ranks)]
    weights = [
        (torch.rand(len(mine), case.step.topk + 4, generator=generator).topk(case.step.topk).indices + 1)
        .sort(dim=1, descending=True)
        .values
        for mine in ids
    ]
    return Routing(ids, weights, case.step.num_experts)


def layer(rank: int, case: Case, routing: Routing, numbers: Numbers, context: DispatchContext) -> Any:
    """Forward and backward of linear experts on one rank: plan, output and gradients."""
    dispatcher = Dispatcher(context, routing.num_experts)
    dispatcher.placement = case.placement
    weight_LMM = numbers.weight_EMM[dispatcher.local_experts].clone().requires_grad_()
    x_TM, probs_TE = numbers.x[rank].clone().requires_grad_(), routing.probs_TE(rank).requires_grad_()
    arrived = dispatcher.dispatch(x_TM, routing.ids[rank], probs_TE.gather(1, routing.ids[rank]))
    counts = arrived.rows_per_slot.tolist()
    parts = zip(arrived.rows_PM.split(counts), arrived.weights_P.split(counts), weight_LMM, strict=True)
    rows = torch.cat([(row @ weight.T) * factor[:, None] for row, factor, weight in parts])
    assert arrived.plan is not None
    output_TM = dispatcher.combine(rows, arrived.plan)
    output_TM.backward(numbers.gradient[rank])
    return arrived.plan, output_TM.detach(), x_TM.grad, probs_TE.grad, weight_LMM.grad


@examples(50)
@given(case=cases(depths=(2, 4), most_ranks=16), data=st.data())
def test_any_scheme_on_any_hierarchy_gives_the_exact_answer(case: Case, data: st.DataObject) -> None:
    schemes = data.draw(st.sampled_from(list(candidate_sets(case.hierarchy).values())))
    check(case, schemes, data.draw(st.integers(0, 99)))


@pytest.mark.slow
@examples(25)
@given(case=cases(depths=(2, 3), most_ranks=8, most_per_rank=2, most_tokens=12), data=st.data())
def test_a_lossy_scheme_keeps_first_choices_then_early_tokens(case: Case, data: st.DataObject) -> None:
    lossy = [schemes for schemes in candidate_sets(case.hierarchy).values() if schemes[0].lossy]
    check(case, data.draw(st.sampled_from(lossy)), data.draw(st.integers(0, 99)))


def check(case: Case, schemes: tuple[DispatchScheme, ...], seed: int) -> None:
    """Compare a layer of linear experts on all ranks with the exact answer, and its plans with the planner."""
    hierarchy, name = case.hierarchy, schemes[0].name
    routing = routing_from(case, torch.Generator().manual_seed(seed))
    numbers = numbers_for(routing)
    cluster = random_cluster(hierarchy, seed=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        world = ThreadWorld(hierarchy, monkeypatch)

        def on_rank(rank: int) -> Any:
            context = DispatchContext(schemes, cluster, world.communicators(rank))
            return layer(rank, case, routing, numbers, context)

        results = world.run(on_rank)
    plans, outputs, x_gradients, probs_gradients, weight_gradients = zip(*results, strict=True)
    counts = count_routing(case.step, case.placement, hierarchy)
    chosen = choose_scheme(schemes, counts, cluster, RowBytes.alike(ROW_BYTES)).scheme
    assert {plan.scheme.name for plan in plans} == {chosen.name}
    kept = None
    if chosen.lossy and chosen.padding:
        kept = kept_pairs(routing, chosen.padding.capacity_factor)
    answer = exact_answer(routing, numbers, kept)
    by_slot = torch.cat(list(weight_gradients))
    got = Answer(list(outputs), list(x_gradients), list(probs_gradients), by_slot[case.placement.slot_E])

    def same(mine: Tensor, theirs: Tensor) -> bool:
        return torch.equal(mine.long(), theirs)

    for rank in range(hierarchy.num_ranks):
        assert same(got.output[rank], answer.output[rank]), (name, rank)
        assert same(got.x_gradient[rank], answer.x_gradient[rank]), (name, rank)
        assert same(got.probs_gradient[rank], answer.probs_gradient[rank]), (name, rank)
    assert same(got.weight_gradient_EMM, answer.weight_gradient_EMM), name
    for rank, plan in enumerate(plans):
        for index, stage in enumerate(plan.stages):
            members = stage.communicator.members
            assert sum(stage.send_rows) == len(stage.copies.source_R)
            assert stage.send_rows == [int(plan.traffic.rows_SGG[index, rank, peer]) for peer in members]
            assert stage.receive_rows == [int(plan.traffic.rows_SGG[index, peer, rank]) for peer in members]


@pytest.mark.slow
@examples(12)
@given(case=cases(depths=(2, 3), most_ranks=8, most_tokens=5), seed=st.integers(0, 99))
def test_dispatch_and_combine_are_adjoint(case: Case, seed: int) -> None:
    routing = routing_from(case, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randint(-9, 10, (len(ids), 3), generator=generator).float() for ids in routing.ids]
    for schemes in candidate_sets(case.hierarchy).values():
        with pytest.MonkeyPatch.context() as monkeypatch:
            world = ThreadWorld(case.hierarchy, monkeypatch)

            def on_rank(rank: int, schemes: Any = schemes, world: ThreadWorld = world) -> tuple[float, float]:
                cluster = random_cluster(case.hierarchy, seed=2)
                context = DispatchContext(schemes, cluster, world.communicators(rank))
                plan = make_plan(routing.ids[rank], routing.weights[rank].float(), case.placement, context, ROW_BYTES)
                arrived_RM = send_rows(x[rank], plan)
                local = torch.Generator().manual_seed(rank)
                y_RM = torch.randint(-9, 10, arrived_RM.shape, generator=local).float()
                return (arrived_RM * y_RM).sum().item(), (x[rank] * return_rows(y_RM, plan)).sum().item()

            there, back = zip(*world.run(on_rank), strict=True)
        assert sum(there) == sum(back)
