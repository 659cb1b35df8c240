"""Weights that go to copies and gradients that go home, on real ranks, against lists that are made one by one."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hiermoe.dispatch import expert_copies
from hiermoe.dispatch.expert_copies import CopiesOfExperts, ShardedExperts
from hiermoe.dispatch.interposer import Interposer
from hiermoe.model import LayerSizes
from hiermoe.policies.price_of_copies import price_copies
from hiermoe.policies.protocol import CopyTerms
from hiermoe.policies.ways_of_copies import part_of_expert, ways_of_copies
from hiermoe.ranks.launch import run_ranks
from hiermoe.topology.placement import Placement
from tests.dispatch.worlds import DEADLINE, TIMEOUT, World
from tests.planner.cases import random_copies

WORLD = World((2, 4))
SEEDS = (0, 1, 2)
LENGTH = 12  # parameters of an expert; parts of a quarter
ALL, FEW = 2**25, 60  # bytes that leave a rank at once: one message for all of it, and many
CASES = ((0, None, ALL), (1, 1, ALL), (2, 2, ALL), (2, 1, FEW))  # seed, relays_from, bytes at once
EXPERTS = 8
SIZES = LayerSizes(EXPERTS, topk=2, hidden_size=4, element_bytes=2, expert_parameters=LENGTH)
WEIGHT_BYTES, GRADIENT_BYTES = 2, 4
TERMS = CopyTerms(shared_buffers=False, gradient_bytes=GRADIENT_BYTES)


@dataclass(frozen=True)
class Seen:
    """What one rank has after both, and what it sent to every rank."""

    weights: dict[int, Tensor]
    sums: dict[int, Tensor]
    weight_bytes: Tensor
    gradient_bytes: Tensor
    said_bytes: tuple[int, int]


def drawn(seed: int) -> tuple[Placement, Placement]:
    """Where experts are at home, and a random map with copies, of which a GPU may have two."""
    generator = torch.Generator().manual_seed(seed)
    home = Placement.of_slots(torch.randperm(EXPERTS, generator=generator))
    return home, random_copies(EXPERTS, (5 + seed) * WORLD.num_ranks, WORLD.num_ranks, generator)


def weight_of(expert: int) -> Tensor:
    return torch.arange(LENGTH).to(torch.bfloat16) + expert


def gradient_at(rank: int, expert: int) -> Tensor:
    return (torch.arange(LENGTH) * 1000 + 37 * rank - 11 * expert).int()


def guests_of(rank: int, placement: Placement) -> set[int]:
    return set(placement.expert_at_S.view(WORLD.num_ranks, -1)[rank].tolist())


def homes_of(home: Placement) -> list[int]:
    return [int(slot) // home.per_rank(WORLD.num_ranks) for slot in home.slot_E]


def travel(rank: int) -> dict[tuple[int, int | None, int], Seen]:
    group = dist.group.WORLD
    assert group is not None
    seen = {}
    with Interposer() as interposer:
        for case in CASES:
            seed, relays, expert_copies.BUFFER_BYTES = case
            home, placement = drawn(seed)
            at_home = {e for e, gpu in enumerate(homes_of(home)) if gpu == rank}
            ways = ways_of_copies(placement, home, WORLD.cluster.hierarchy, relays, EXPERTS)
            copies, here = CopiesOfExperts(ways, group), guests_of(rank, placement) | at_home
            weights = {e: weight_of(e) if e in at_home else torch.zeros(LENGTH).bfloat16() for e in here}
            gradients = {e: gradient_at(rank, e) for e in here}
            said = copies.spread(weights, "weights"), copies.sum_home(gradients, "home")
            sums = {e: gradients[e] for e in at_home}
            weight_bytes, gradient_bytes = sent(interposer, "weights", "home")
            seen[case] = Seen(weights, sums, weight_bytes, gradient_bytes, said)
    return seen


def sent(interposer: Interposer, *stages: str) -> list[Tensor]:
    """Bytes to every rank, by stage."""
    found = {stage: torch.zeros(WORLD.num_ranks, dtype=torch.int64) for stage in stages}
    for transfer in interposer.drain():
        if transfer.operation == "send":
            found[transfer.stage] += torch.tensor(transfer.sent_bytes)
    return list(found.values())


def chain(expert: int, home: list[int], placement: Placement, relays: int | None) -> list[tuple[int, int]]:
    """Hops of one expert: from home to each GPU, or from the nearest to the next nearest."""
    mine = home[expert]
    have = [rank for rank in range(WORLD.num_ranks) if expert in guests_of(rank, placement) and rank != mine]
    if relays is None or len(have) < relays:
        return [(mine, rank) for rank in have]
    per_node = WORLD.num_ranks // WORLD.groups[0]
    have.sort(key=lambda rank: (rank // per_node != mine // per_node, rank))
    return list(zip([mine, *have], have, strict=False))


def both(rank: int) -> tuple[Any, Any]:
    return travel(rank), gather(rank)


@pytest.fixture(scope="module")
def results() -> list[tuple[Any, Any]]:
    return run_ranks(both, WORLD.num_ranks, (), TIMEOUT, deadline=DEADLINE, hosts=WORLD.hosts)


def test_copies_get_what_is_at_home_and_homes_the_sum_and_bytes_are_those_of_the_list_and_the_price(
    results: list[tuple[Any, Any]],
) -> None:
    for case in CASES:
        seed, relays, _ = case
        home, placement = drawn(seed)
        homes = homes_of(home)
        hops = [hop for expert in range(EXPERTS) for hop in chain(expert, homes, placement, relays)]
        expected = torch.zeros(WORLD.num_ranks, WORLD.num_ranks, dtype=torch.int64)
        for source, target in hops:
            expected[source, target] += LENGTH
        mine = [travelled[case] for travelled, _ in results]
        assert torch.equal(torch.stack([one.weight_bytes for one in mine]), WEIGHT_BYTES * expected), case
        assert torch.equal(torch.stack([one.gradient_bytes for one in mine]), GRADIENT_BYTES * expected.T), case
        price = price_copies(placement, home, WORLD.cluster, replace(TERMS, relays_from=relays), SIZES)
        assert price.weights.moved_bytes == sum(one.said_bytes[0] for one in mine) > 0
        assert price.gradients.moved_bytes == sum(one.said_bytes[1] for one in mine) > 0
        for one in mine:
            assert all(torch.equal(weight, weight_of(expert)) for expert, weight in one.weights.items()), case
        for expert in range(EXPERTS):
            ranks = {r for r in range(WORLD.num_ranks) if expert in guests_of(r, placement)} | {homes[expert]}
            total = torch.stack([gradient_at(rank, expert) for rank in ranks]).sum(0)
            assert torch.equal(mine[homes[expert]].sums[expert].long(), total), case
    chains = [len(chain(e, homes_of(drawn(2)[0]), drawn(2)[1], 1)) for e in range(EXPERTS)]
    assert max(chains) > 1  # something was passed on


def gather(rank: int) -> list[tuple[list[Tensor], list[Tensor], Tensor, Tensor, int, int]]:
    group = dist.group.WORLD
    assert group is not None
    seen = []
    part = slice(rank * LENGTH // WORLD.num_ranks, (rank + 1) * LENGTH // WORLD.num_ranks)
    with Interposer() as interposer:
        for seed, piece in zip(SEEDS, (ALL, FEW, 1), strict=True):
            expert_copies.BUFFER_BYTES = piece
            _, placement = drawn(seed)
            mine = placement.expert_at_S.view(WORLD.num_ranks, -1)[rank].tolist()
            slots = [torch.zeros(LENGTH).bfloat16() for _ in mine]
            sharded = ShardedExperts(placement, group)
            weight_bytes = sharded.gather([weight_of(e)[part].clone() for e in range(EXPERTS)], slots, "weights")
            sums, gradient_bytes = sharded.sum_parts([gradient_at(rank, e) for e in mine], "home")
            seen.append((slots, sums, *sent(interposer, "weights", "home"), weight_bytes, gradient_bytes))
    return seen


def test_sharded_experts_fill_every_slot_and_every_part_gets_the_sum(results: list[tuple[Any, Any]]) -> None:
    for number, seed in enumerate(SEEDS):
        home, placement = drawn(seed)
        at_RS = placement.expert_at_S.view(WORLD.num_ranks, -1).tolist()
        total_E = [torch.zeros(LENGTH, dtype=torch.int64) for _ in range(EXPERTS)]
        for rank, mine in enumerate(at_RS):
            for expert in mine:
                total_E[expert] += gradient_at(rank, expert)
        price = price_copies(placement, home, WORLD.cluster, replace(TERMS, sharded=True), SIZES)
        assert price.weights.moved_bytes == sum(gathered[number][4] for _, gathered in results)
        assert price.gradients.moved_bytes == sum(gathered[number][5] for _, gathered in results)
        each = len(at_RS[0]) * LENGTH // WORLD.num_ranks
        for rank, (_, gathered) in enumerate(results):
            slots, sums, weight_bytes, gradient_bytes, *_ = gathered[number]
            assert all(torch.equal(slot, weight_of(e)) for slot, e in zip(slots, at_RS[rank], strict=True))
            part = slice(rank * LENGTH // WORLD.num_ranks, (rank + 1) * LENGTH // WORLD.num_ranks)
            assert all(torch.equal(x.long(), total[part]) for x, total in zip(sums, total_E, strict=True))
            others = torch.tensor([each * (other != rank) for other in range(WORLD.num_ranks)])
            assert torch.equal(weight_bytes, WEIGHT_BYTES * others)
            assert torch.equal(gradient_bytes, GRADIENT_BYTES * others)


@pytest.mark.parametrize("parameters", [1, 7, 12])
def test_a_part_is_what_everybody_keeps_at_most(parameters: int) -> None:
    part = part_of_expert(parameters, 4)
    assert 4 * (part - 1) < parameters <= 4 * part
