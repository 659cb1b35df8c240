"""The bytes that ranks send are the planner's rows, to the byte, and nothing else is sent."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from hiermoe.dispatch.interposer import Transfer
from hiermoe.model import RowBytes
from hiermoe.planner.cost import choose_scheme
from hiermoe.planner.counts import RoutingCounts, count_routing
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.planner.traffic import exact_traffic, pair_traffic
from hiermoe.topology.placement import Placement
from tests.dispatch.contract import IDENTITY, MOVED, Outcome
from tests.dispatch.routings import PLACED, WIDTH, placement_of, routing_of
from tests.dispatch.worlds import TRANSPORTS, WORLDS, World, cases_of, transport_of

ROW_BYTES = WIDTH * 4  # fp32
WEIGHT_BYTES = 4
EXPERT_BYTES = 2  # of an expert's number in the metadata

PHASES = ["dispatch", "combine", "combine_backward", "dispatch_backward"]
Results = Callable[[World], list[dict[Any, Any]]]
Sent = dict[tuple[str, str, str, str], Tensor]  # phase, stage, operation, kind -> [source, destination]

pytestmark = pytest.mark.xdist_group("contract")
for_every_system = pytest.mark.parametrize(
    ("world", "system"), [(w, s) for w in WORLDS for s in TRANSPORTS if w.runs(s)], ids=str
)


def runs_of(world: World, system: str) -> Iterable[tuple[str, str, Placement]]:
    """Cases and placements that the system ran with."""
    for case in cases_of(world):
        num_experts = routing_of(case, world.num_ranks).num_experts
        yield case, IDENTITY, Placement.identity(num_experts)
        if case in PLACED and transport_of(system).executor == "staged":
            yield case, MOVED, placement_of(case, num_experts)


def used_scheme(world: World, system: str, counts: RoutingCounts) -> DispatchScheme:
    candidates = transport_of(system).build_schemes(world.cluster.hierarchy)
    return choose_scheme(candidates, counts, world.cluster, RowBytes.alike(ROW_BYTES)).scheme


def matrices(outcomes: list[Outcome], received: bool) -> Sent:
    """All ranks' transfers as bytes from every source to every destination, by what senders or receivers saw."""
    ranks = len(outcomes)
    result: Sent = defaultdict(lambda: torch.zeros(ranks, ranks, dtype=torch.int64))
    for rank, outcome in enumerate(outcomes):
        for phase, transfers in outcome.calls:
            for transfer in transfers:
                assert transfer.phase == phase
                amounts = transfer.received_bytes if received else transfer.sent_bytes
                for peer, amount in zip(transfer.members, amounts, strict=True):
                    source, destination = (peer, rank) if received else (rank, peer)
                    key = phase, transfer.stage, transfer.operation, transfer.kind
                    result[key][source, destination] += amount
    return dict(result)


def expected(world: World, system: str, counts: RoutingCounts) -> Sent:
    """What the planner says is sent, payload and everything else."""
    hierarchy, ranks = world.cluster.hierarchy, world.num_ranks
    scheme = used_scheme(world, system, counts)
    staged = transport_of(system).executor == "staged"
    num_experts = counts.pairs_GS.shape[1]
    count_bytes = 4 * (sum(hierarchy.groups) + num_experts + 1) if staged else 8 * num_experts
    result: Sent = {("dispatch", "counts", "all_gather", "metadata"): torch.full((ranks, ranks), count_bytes)}
    rows_SGG = exact_traffic(scheme, counts, hierarchy).rows_SGG
    pairs_SGG = pair_traffic(scheme, counts, hierarchy)
    for index, stage in enumerate(scheme.stages):
        name = f"{index + 1}:{stage.peers}"
        payload, pairs = rows_SGG[index] * ROW_BYTES, pairs_SGG[index]
        for phase in PHASES:
            backwards = phase in ("combine", "dispatch_backward")
            result[phase, name, "all_to_all", "payload"] = payload.T if backwards else payload
        per_pair = WEIGHT_BYTES + EXPERT_BYTES if staged else WEIGHT_BYTES
        result["dispatch", name, "all_to_all", "metadata"] = pairs * per_pair
        result["dispatch_backward", name, "all_to_all", "metadata"] = pairs.T * WEIGHT_BYTES
    return result


@for_every_system
def test_bytes_of_every_stage_source_and_destination_are_the_planners(
    contract_results: Results, world: World, system: str
) -> None:
    for case, where, placement in runs_of(world, system):
        outcomes = [result[system, case, where] for result in contract_results(world)]
        counts = count_routing(routing_of(case, world.num_ranks).step, placement, world.cluster.hierarchy)
        wanted = expected(world, system, counts)
        for received in (False, True):
            seen = matrices(outcomes, received)
            assert set(seen) == set(wanted), (case, where)
            wrong = {key: (seen[key], wanted[key]) for key in wanted if not torch.equal(seen[key], wanted[key])}
            assert not wrong, (case, where, wrong)


def waves(names: list[str], chunks: int) -> list[str]:
    """Stages in the order in which they begin: of those of a wave, the chunk that is furthest first."""
    return [names[w - c] for w in range(len(names) + chunks - 1) for c in range(chunks) if 0 <= w - c < len(names)]


@for_every_system
def test_counts_are_gathered_once_and_every_stage_exchanges_once_a_phase_and_chunk(
    contract_results: Results, world: World, system: str
) -> None:
    for case, where, placement in runs_of(world, system):
        counts = count_routing(routing_of(case, world.num_ranks).step, placement, world.cluster.hierarchy)
        scheme = used_scheme(world, system, counts)
        names = [f"{index + 1}:{stage.peers}" for index, stage in enumerate(scheme.stages)]
        for result in contract_results(world):
            outcome = result[system, case, where]
            assert [phase for phase, _ in outcome.calls] == PHASES
            assert outcome.scheme in ("", scheme.name)
            by_phase = dict(outcome.calls)
            onwards = waves(names, scheme.chunks)
            back = waves(names[::-1], scheme.chunks)

            def stages(transfers: tuple[Transfer, ...], kind: str) -> list[str]:
                return [transfer.stage for transfer in transfers if transfer.kind == kind]

            assert stages(by_phase["dispatch"], "metadata") == ["counts", *names], case
            assert stages(by_phase["dispatch"], "payload") == onwards, case
            assert stages(by_phase["combine"], "payload") == back, case
            assert stages(by_phase["combine_backward"], "payload") == onwards, case
            assert stages(by_phase["dispatch_backward"], "payload") == back, case
            assert stages(by_phase["dispatch_backward"], "metadata") == names[::-1], case
            assert not stages(by_phase["combine"] + by_phase["combine_backward"], "metadata"), case


@for_every_system
def test_combine_sends_no_more_payload_than_dispatch(contract_results: Results, world: World, system: str) -> None:
    for case, where, _ in runs_of(world, system):
        sent = matrices([result[system, case, where] for result in contract_results(world)], False)

        def payload(phase: str, sent: Sent = sent) -> int:
            return sum(int(amount.sum()) for key, amount in sent.items() if (key[0], key[3]) == (phase, "payload"))

        assert payload("combine") <= payload("dispatch"), case
        assert payload("dispatch_backward") <= payload("combine_backward"), case


@pytest.mark.slow
@pytest.mark.parametrize("system", [s for s in TRANSPORTS if WORLDS[1].runs(s)])
def test_deduplicating_systems_send_fewer_rows_than_pairs(contract_results: Results, system: str) -> None:
    world, case = WORLDS[1], "all_experts"
    counts = count_routing(
        routing_of(case, world.num_ranks).step, Placement.identity(2 * world.num_ranks), world.cluster.hierarchy
    )
    scheme = used_scheme(world, system, counts)
    sent = matrices([result[system, case, IDENTITY] for result in contract_results(world)], False)
    for index, stage in enumerate(scheme.stages):
        rows = int(sent["dispatch", f"{index + 1}:{stage.peers}", "all_to_all", "payload"].sum()) // ROW_BYTES
        pairs = int(counts.pairs_GS.sum())
        assert rows < pairs if stage.rows == "token" else rows >= pairs
