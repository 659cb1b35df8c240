"""Ranks must sit on hosts as the hierarchy says, and every row finds its receiver among the members of its stage."""

import os
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from hiermoe.dispatch.communicators import HOST_VARIABLE, Communicators, check_hosts, played_hosts
from hiermoe.planner.scheme import DispatchScheme, stage_routes
from hiermoe.ranks.launch import run_ranks
from hiermoe.records.status import NotApplicable
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import WORLD, Peers
from tests.dispatch.worlds import DEADLINE, SYSTEMS, TIMEOUT, World, transport_of
from tests.planner.cases import examples, hierarchies

TWO_NODES = Hierarchy((2, 8), ("node", "gpu"))
HALVES_OF_A_NODE = Hierarchy((1, 2, 4), ("node", "half", "gpu"))
NO_NODE = Hierarchy((2, 4), ("half", "gpu"))


@pytest.mark.parametrize(
    ("hosts", "hierarchy"),
    [
        (["a"] * 4 + ["b"] * 4, TWO_NODES),
        (["b"] * 4 + ["a"] * 4, TWO_NODES),
        (["a"] * 4, HALVES_OF_A_NODE),
        (["a"] * 4, NO_NODE),
    ],
)
def test_hosts_in_order_are_accepted(hosts: list[str], hierarchy: Hierarchy) -> None:
    check_hosts(hosts, hierarchy)


@pytest.mark.parametrize(
    ("hosts", "hierarchy", "message"),
    [
        (["a", "b"] * 4, TWO_NODES, r"rank 1 runs on host b, but .* node 0 with rank 0 on host a: .* 4 a host"),
        (["a"] * 8, TWO_NODES, r"rank 4 runs on host a like rank 0, but .* different nodes of 4 ranks"),
        (["a"] * 3 + ["b"] * 5, TWO_NODES, r"rank 3 runs on host b, but .* node 0"),
        (["a"] * 4 + ["b"] * 3 + ["a"], TWO_NODES, r"rank 7 runs on host a, but .* node 1 with rank 4 on host b"),
        (["a", "a", "a", "b"], HALVES_OF_A_NODE, r"rank 3 runs on host b, but .* node 0"),
        (["a", "a", "b", "b"], NO_NODE, r"rank 2 runs on host b, but .* node 0"),
    ],
    ids=["interleaved", "two nodes on one host", "node split over hosts", "one rank astray", "one node", "no node"],
)
def test_the_first_rank_on_a_wrong_host_is_named(hosts: list[str], hierarchy: Hierarchy, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_hosts(hosts, hierarchy)


@examples(60)
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_one_wrong_host_is_always_noticed(nodes: int, lanes: int, data: st.DataObject) -> None:
    if nodes == lanes == 1:
        return  # one rank is right wherever it is
    hierarchy = Hierarchy((nodes, nodes * lanes), ("node", "gpu")) if lanes > 1 else Hierarchy((nodes,), ("node",))
    hosts = played_hosts(hierarchy)
    check_hosts(hosts, hierarchy)
    rank = data.draw(st.integers(0, len(hosts) - 1))
    others = {*hosts, "elsewhere"} - {hosts[rank]}
    if lanes == 1:
        others -= {"elsewhere"}  # a node of one rank may be any host that no other node is
    hosts[rank] = data.draw(st.sampled_from(sorted(others)))
    with pytest.raises(ValueError, match="rank"):
        check_hosts(hosts, hierarchy)


def schemes_of(system: str, hierarchy: Hierarchy) -> tuple[DispatchScheme, ...]:
    try:
        return transport_of(system).build_schemes(hierarchy)
    except NotApplicable:
        return ()


@pytest.mark.parametrize("system", SYSTEMS)
def test_sender_and_receiver_of_every_row_are_members_of_the_stage(system: str) -> None:
    for groups in [(2, 4), (4, 8), (2, 4, 8), (1, 2, 8), (4, 8, 16, 32), (3, 6, 24)]:
        hierarchy = Hierarchy(groups)
        for scheme in schemes_of(system, hierarchy):
            for stage, route in zip(scheme.stages, stage_routes(scheme, hierarchy), strict=True):
                for sender, receiver in {divmod(pair, hierarchy.num_ranks) for pair in route.view(-1).tolist()}:
                    assert receiver in stage.peers.members(sender, hierarchy)
                    assert sender in stage.peers.members(receiver, hierarchy)


@examples(60)
@given(hierarchies((1, 4)))
def test_members_are_an_ascending_group_that_all_of_them_agree_on(hierarchy: Hierarchy) -> None:
    kinds = [WORLD]
    kinds += [Peers(kind, level) for kind in ("inter", "intra") for level in range(1, hierarchy.depth + 1)]  # type: ignore[arg-type]
    for peers in kinds:
        for rank in range(hierarchy.num_ranks):
            members = peers.members(rank, hierarchy)
            assert rank in members
            assert list(members) == sorted(set(members))
            assert len(members) == peers.size(hierarchy)
            assert peers.position(rank, hierarchy) == members.index(rank)
            assert [peers.receiver(rank, other, hierarchy) for other in members] == list(members)
            for level in range(1, hierarchy.depth + 1):
                lanes = hierarchy.lanes(level)
                near = sum(member // lanes == rank // lanes for member in members)
                assert peers.size_inside(level, hierarchy) == near
            assert all(peers.members(member, hierarchy) == members for member in members)


def errors_on_ranks(rank: int) -> dict[str, Any]:
    """What this rank is told of wrong hierarchies and hosts; then that a right one still works."""
    world = World((2, 4))
    group = dist.group.WORLD
    assert group is not None
    errors: dict[str, Any] = {}

    def attempt(name: str, hierarchy: Hierarchy) -> None:
        try:
            Communicators(group, hierarchy, ())
        except ValueError as error:
            errors[name] = str(error)

    attempt("size", World((2, 4, 8)).cluster.hierarchy)
    os.environ[HOST_VARIABLE] = f"host{rank % 2}"
    attempt("hosts", world.cluster.hierarchy)
    os.environ[HOST_VARIABLE] = world.hosts[rank]
    system = transport_of("tutel_2dh").build_schemes(world.cluster.hierarchy)
    communicators = Communicators(group, world.cluster.hierarchy, system)
    errors["members"] = [
        (communicators.of(stage.peers).members, dist.get_process_group_ranks(communicators.of(stage.peers).group))
        for stage in system[0].stages
    ]
    try:
        communicators.of(Peers("inter", 2))
    except KeyError:
        errors["unknown"] = "KeyError"
    return errors


def test_every_rank_is_told_of_a_hierarchy_or_a_host_that_does_not_fit() -> None:
    results = run_ranks(errors_on_ranks, 4, (), TIMEOUT, deadline=DEADLINE)
    for rank, errors in enumerate(results):
        assert errors["size"] == "ep_size=4, but the cluster's hierarchy has 8 GPUs ([2, 4, 8] groups)"
        assert errors["hosts"].startswith("rank 1 runs on host host1, but the hierarchy puts it into node 0")
        intra, inter = ([0, 1], [0, 2]) if rank == 0 else ([2, 3], [1, 3]) if rank == 3 else (None, None)
        for (members, global_ranks), expected in zip(errors["members"], (intra, inter), strict=True):
            assert list(members) == global_ranks
            assert rank in members
            assert expected is None or global_ranks == expected
        assert errors["unknown"] == "KeyError"
