"""Experts with copies on real ranks: every token reaches the chosen copy of each of its experts, once.

Sources that split their tokens by quotas among them, and tokens that choose for themselves.
"""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hiermoe.dispatch.communicators import Communicators
from hiermoe.dispatch.dispatcher import Dispatcher
from hiermoe.dispatch.interposer import Interposer
from hiermoe.dispatch.plan import DispatchContext
from hiermoe.model import RowBytes
from hiermoe.planner.cost import choose_scheme
from hiermoe.planner.counts import RoutingCounts
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.planner.traffic import pair_traffic
from hiermoe.ranks.launch import run_ranks
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.dispatch.routings import Routing, choose
from tests.dispatch.test_random_worlds import candidate_sets
from tests.dispatch.worlds import DEADLINE, TIMEOUT, World
from tests.planner.cases import with_quotas
from tests.planner.reference import with_slots

WORLDS = [World((2, 4)), World((2, 4, 8))]
SEEDS = (0, 1, 2, 3, 4)
SPLIT = (2, 4)
GATHERED = (3, 4)
ROW_BYTES = 2 * 4
PAIR_BYTES = 2 + 4  # a slot's number and a weight
Row = tuple[int, ...]  # source, token, slot, weight


@dataclass(frozen=True)
class Seen:
    """What one rank saw of one dispatch and combine."""

    rows: list[Row]
    is_exact: bool
    scheme: str
    stages: list[str]
    sent: dict[tuple[str, str], Tensor]  # stage, kind -> bytes to every rank


def drawn(seed: int, world: World) -> tuple[Routing, Placement]:
    """A routing, a map with one or two more slots a rank than experts need, and every source's choice of copies.

    Of some seeds every source splits, in any proportion; of some each token goes to few groups.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = world.num_ranks
    num_experts, num_slots = 2 * ranks, (3 + seed % 2) * ranks
    popularity = 1 / (1 + torch.randperm(num_experts, generator=generator).float())
    routing = choose([5 + rank % 3 - 5 * (rank == seed) for rank in range(ranks)], popularity, 4, generator)
    more = torch.randint(num_experts, (num_slots - num_experts,), generator=generator)
    expert_at_S = torch.cat([torch.arange(num_experts), more])[torch.randperm(num_slots, generator=generator)]
    copies = [(expert_at_S == e).nonzero().view(-1) for e in range(num_experts)]
    choice = torch.rand(ranks, num_experts, generator=generator)
    copy_GE = torch.stack([mine[(choice[:, e] * len(mine)).long()] for e, mine in enumerate(copies)], dim=1)
    placement = Placement(expert_at_S, copy_GE)
    placement = with_quotas(placement, 5, generator) if seed in SPLIT else placement
    return routing, replace(placement, gathered_in=world.cluster.hierarchy if seed in GATHERED else None)


def lossless_sets(hierarchy: Hierarchy) -> dict[str, tuple[DispatchScheme, ...]]:
    return {name: schemes for name, schemes in candidate_sets(hierarchy).items() if not schemes[0].lossy}


def deliver(rank: int, world: World) -> dict[tuple[int, str], Seen]:
    hierarchy, sets = world.cluster.hierarchy, lossless_sets(world.cluster.hierarchy)
    assert dist.group.WORLD is not None
    communicators = Communicators(dist.group.WORLD, hierarchy, [s for schemes in sets.values() for s in schemes])
    seen = {}
    for seed in SEEDS:
        routing, placement = drawn(seed, world)
        for name, schemes in sets.items():
            dispatcher = Dispatcher(DispatchContext(schemes, world.cluster, communicators), routing.num_experts)
            dispatcher.placement = placement
            seen[seed, name] = observe(rank, dispatcher, routing)
    return seen


def observe(rank: int, dispatcher: Dispatcher, routing: Routing) -> Seen:
    """Tokens that carry their own numbers, and experts that multiply by theirs."""
    ids_TK = routing.ids[rank]
    x_TM = torch.stack([torch.full((len(ids_TK),), rank), torch.arange(len(ids_TK))], dim=1).float().requires_grad_()
    weights_TK = routing.weights[rank].float().requires_grad_()
    with Interposer() as interposer:
        arrived = dispatcher.dispatch(x_TM, ids_TK, weights_TK)
        transfers = interposer.drain()
    experts = dispatcher.local_experts
    factor_P = (experts + 1).repeat_interleave(arrived.rows_per_slot)
    assert arrived.plan is not None
    output_TM = dispatcher.combine(arrived.rows_PM * (arrived.weights_P * factor_P)[:, None], arrived.plan)
    output_TM.backward(torch.ones_like(output_TM))
    factor_TK = ids_TK + 1
    scale_T1 = (routing.weights[rank] * factor_TK).sum(1, keepdim=True)
    assert x_TM.grad is not None and weights_TK.grad is not None
    exact = [
        torch.equal(output_TM.detach(), x_TM.detach() * scale_T1),
        torch.equal(x_TM.grad, scale_T1.expand(-1, 2).float()),
        torch.equal(weights_TK.grad, x_TM.detach().sum(1, keepdim=True) * factor_TK),
    ]
    slot_P = (rank * len(experts) + torch.arange(len(experts))).repeat_interleave(arrived.rows_per_slot)
    rows = torch.cat([arrived.rows_PM.detach().long(), slot_P[:, None], arrived.weights_P.detach().long()[:, None]], 1)
    sent: dict[tuple[str, str], Tensor] = {}
    for transfer in transfers:
        amounts = sent.setdefault((transfer.stage, transfer.kind), torch.zeros(len(routing.ids), dtype=torch.int64))
        amounts[list(transfer.members)] += torch.tensor(transfer.sent_bytes)
    stages = [stage.name for stage in arrived.plan.stages]
    real = rows[rows[:, 3] > 0].tolist()  # padding has no weight
    return Seen([tuple(row) for row in real], all(exact), arrived.plan.scheme.name, stages, sent)


def naive_counts(routing: Routing, placement: Placement, hierarchy: Hierarchy) -> RoutingCounts:
    """Token by token."""
    ranks, num_slots = hierarchy.num_ranks, placement.num_slots
    tokens = tuple(torch.zeros(ranks, groups, dtype=torch.int64) for groups in hierarchy.groups)
    pairs = torch.zeros(ranks, num_slots, dtype=torch.int64)
    for source, slots in ((source, slots) for source, _, slots in chosen_slots(routing, placement)):
        for slot in slots:
            pairs[source, slot] += 1
        for level, groups in enumerate(hierarchy.groups):
            for group in {slot // (num_slots // groups) for slot in slots}:
                tokens[level][source, group] += 1
    return RoutingCounts(tokens, pairs, torch.tensor([len(ids) for ids in routing.ids]), routing.topk)


def chosen_slots(routing: Routing, placement: Placement) -> list[tuple[int, int, list[int]]]:
    """Source, token and the slots that it needs, in the order of its experts."""
    numbered = [(source, token) for source, ids in enumerate(routing.ids) for token in range(len(ids))]
    tokens = [(source, tuple(routing.ids[source][token].tolist())) for source, token in numbered]
    chosen = with_slots(placement, tokens)
    return [(*number, list(slots)) for number, (_, slots) in zip(numbered, chosen, strict=True)]


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_every_token_reaches_the_chosen_copies_once_and_bytes_are_the_planners(world: World) -> None:
    results = run_ranks(deliver, world.num_ranks, (world,), TIMEOUT, deadline=DEADLINE, hosts=world.hosts)
    hierarchy, cluster = world.cluster.hierarchy, world.cluster
    for seed in SEEDS:
        routing, placement = drawn(seed, world)
        assert placement.has_copies and placement.copy_GE is not None
        assert bool((placement.copy_GE != placement.copy_GE[0]).any())  # sources choose differently
        used = {(source, e, slot) for source, token, slots in chosen_slots(routing, placement)
                for e, slot in zip(routing.ids[source][token].tolist(), slots, strict=True)}  # fmt: skip
        assert (len(used) > len({(source, e) for source, e, _ in used})) == (seed in (*SPLIT, *GATHERED))
        plain = naive_counts(routing, replace(placement, gathered_in=None), hierarchy)
        counts = naive_counts(routing, placement, hierarchy)
        fewer = [int(before.sum() - after.sum()) for before, after in zip(plain.tokens, counts.tokens, strict=True)]
        assert (fewer > [0] * hierarchy.depth) == (seed in GATHERED)  # the outermost level counts first
        wanted = sorted(
            (source, token, slot, weight)
            for source, token, slots in chosen_slots(routing, placement)
            for slot, weight in zip(slots, routing.weights[source][token].tolist(), strict=True)
        )
        for name, schemes in lossless_sets(hierarchy).items():
            seen = [result[seed, name] for result in results]
            assert sorted(row for mine in seen for row in mine.rows) == wanted, name
            assert all(mine.is_exact for mine in seen), name
            chosen = choose_scheme(schemes, counts, cluster, RowBytes.alike(ROW_BYTES))
            assert {mine.scheme for mine in seen} == {chosen.scheme.name}
            pairs_SGG = pair_traffic(chosen.scheme, counts, hierarchy)
            for index, stage in enumerate(seen[0].stages):
                rows = torch.stack([mine.sent[stage, "payload"] for mine in seen])
                metadata = torch.stack([mine.sent[stage, "metadata"] for mine in seen])
                assert torch.equal(rows, chosen.traffic.rows_SGG[index] * ROW_BYTES), (name, stage)
                assert torch.equal(metadata, pairs_SGG[index] * PAIR_BYTES), (name, stage)
