"""Constants derived from ports: against known links, against the paper's published ones, and on scaled clusters."""

import pytest
import torch

from hiermoe.planner.counts import count_routing
from hiermoe.planner.scheme import hierarchical
from hiermoe.planner.traffic import exact_traffic
from hiermoe.records.groups import files_of
from hiermoe.records.project import CONF
from hiermoe.routing.step import RoutingStep
from hiermoe.topology.cluster import Cluster, Level, OuterLevel
from hiermoe.topology.data_sheet import DERIVED, MESSAGES_AT_ONCE, START_US, Port, derived
from hiermoe.topology.peers import WORLD, AlphaBeta, Peers
from hiermoe.topology.placement import Placement
from hiermoe.topology.scaling import scaled

PROFILES = ["h100_ib400", "h800_ib400", "gb200_nvl72_ib400", "gb200_nvl72_ib800", "a100_ib200", "cloud_eth100"]
PROFILES += ["gb300_nvl72_ib800", "mi300x_ib400", "mi355x_roce400", "b300_efa800", "ascend910b_roce200"]
MEASURED_INSIDE = ["b200_ib400", "b200_efa400", "h100_efa400", "h200_efa400"]  # a node's port, by others

# The paper's link rates (conf/cluster/a6000_4x8.yaml): who shares each link on the way out of a group.
TESTBED = [
    Port(gb_per_s=25.0, gpus=8, latency_us=0, source="200 Gb/s card"),
    Port(gb_per_s=31.5, gpus=4, latency_us=0, source="PCIe 4.0 x16 into the QPI"),
    Port(gb_per_s=31.5, gpus=1, latency_us=0, source="PCIe 4.0 x16"),
    Port(gb_per_s=56.25, gpus=1, latency_us=0, source="NVLink"),
]
PUBLISHED_OVER_DERIVED = {  # beta of Fig. 9 over what the links' rates allow: how optimistic a data sheet is
    "world": 2.38,
    "inter1": 2.20,
    "intra1": 2.00,
    "inter2": 1.84,
    "intra2": 1.66,
    "inter3": 1.30,
    "intra3": 1.85,
}


def port(gb_per_s: float, gpus: int = 1, latency_us: float = 1.0, oversubscription: float = 1.0) -> Port:
    return Port(
        gb_per_s=gb_per_s, gpus=gpus, latency_us=latency_us, oversubscription=oversubscription, source="made up"
    )


def a_cluster(groups: tuple[int, ...], ports: list[Port], **more: object) -> Cluster:
    levels = [
        Level.model_validate({"name": f"level{i}", "groups": n, "port": p.model_dump()})
        for i, (n, p) in enumerate(zip(groups, ports, strict=True), start=1)
    ]
    return Cluster.model_validate({"name": "made_up", "description": "made up", "levels": levels, **more})


@pytest.mark.parametrize("exchange", PUBLISHED_OVER_DERIVED)
def test_published_betas_exceed_what_the_testbeds_links_allow(exchange: str) -> None:
    paper = Cluster.named("a6000_4x8")
    peers = next(x for x in paper.exchanges if str(x) == exchange)
    beta = derived(peers, paper.hierarchy, TESTBED).beta_ms_per_byte
    assert paper.constants(peers).beta_ms_per_byte / beta == pytest.approx(PUBLISHED_OVER_DERIVED[exchange], abs=0.006)


@pytest.mark.parametrize("name", ["emulated_4x8", "emulated_4x2"])
def test_shaped_links_give_the_betas_that_were_worked_out_by_hand(name: str) -> None:
    cluster = Cluster.named(name)
    hierarchy = cluster.hierarchy
    idle = port(1e9)
    ports = [port(r / 8e3, hierarchy.lanes(i)) for i, r in enumerate(cluster.shaped_rates, start=1)]
    ports += [idle] * (hierarchy.depth - len(ports))
    for peers in cluster.exchanges[: 2 * len(cluster.shaped_rates)]:  # the innermost intra crosses no shaped link
        known = cluster.constants(peers).beta_ms_per_byte
        assert derived(peers, hierarchy, ports).beta_ms_per_byte == pytest.approx(known, rel=1e-3)


def test_beta_is_the_time_of_the_busiest_port_for_even_routing() -> None:
    """Every GPU sends one token to every GPU; what crosses each port is counted pair by pair."""
    cluster = a_cluster((2, 4, 12), [port(5, 6, oversubscription=1.5), port(4, 3), port(8)])
    hierarchy = cluster.hierarchy
    ids_NK = torch.arange(12).repeat(12)[:, None]
    step = RoutingStep(ids_NK, torch.arange(12).repeat_interleave(12), 12, 12)
    counts = count_routing(step, Placement.identity(12), hierarchy)
    for dimension in (1, 2, 3):
        scheme = hierarchical(dimension, False, hierarchy)
        traffic = exact_traffic(scheme, counts, hierarchy)
        busiest = traffic.busiest_rows().tolist()
        for stage, rows_GG, n in zip(scheme.stages, traffic.rows_SGG.tolist(), busiest, strict=True):
            slowest = 0.0
            for level, spec in enumerate(cluster.levels, start=1):
                lanes = hierarchy.lanes(level)
                assert spec.port is not None
                for group in range(hierarchy.U[level]):
                    crossing = sum(
                        rows_GG[s][d]
                        for s in range(12)
                        for d in range(12)
                        if s // lanes != group and d // lanes == group
                    )
                    ports = lanes // spec.port.gpus
                    rate = ports * spec.port.gb_per_s * 1e6 / spec.port.oversubscription
                    slowest = max(slowest, crossing / rate)
            assert cluster.constants(stage.peers).beta_ms_per_byte * n == pytest.approx(slowest, rel=1e-12)


def test_alpha_starts_once_and_waits_for_eights_of_messages() -> None:
    cluster = a_cluster((4, 32), [port(50, latency_us=14.0), port(450, latency_us=3.4)])
    far, near = 24 * 14.0, 7 * 3.4
    assert cluster.constants(WORLD).alpha_ms * 1e3 == pytest.approx(START_US + (far + near) / MESSAGES_AT_ONCE)
    assert cluster.constants(Peers("inter", 1)).alpha_ms * 1e3 == pytest.approx(START_US + 14.0)  # three: one latency
    assert cluster.constants(Peers("intra", 1)).alpha_ms * 1e3 == pytest.approx(START_US + 3.4)


def test_stated_constants_win_over_derived_ones() -> None:
    line = AlphaBeta(alpha_ms=1.0, beta_ms_per_byte=1e-7, source="measured")
    bare = a_cluster((2, 4), [port(50), port(450)])
    assert bare.from_data_sheets and bare.constants(WORLD).source.startswith(DERIVED)
    node = bare.levels[0].model_copy(update={"inter": line, "intra": line})
    measured = bare.model_copy(update={"world": line, "levels": (node, bare.levels[1])})
    assert not measured.from_data_sheets
    assert all(measured.constants(peers) == line for peers in measured.exchanges)


@pytest.mark.parametrize(
    ("groups", "ports", "more", "message"),
    [
        ((2, 8), [port(50, gpus=3), port(450)], {}, "level level1: 3 GPUs share a port, a group has 4 GPUs"),
        ((2, 8), [port(50), port(450, gpus=2)], {}, "level level2: 2 GPUs share a port, a group has 1 GPUs"),
    ],
)
def test_ports_that_do_not_fit_are_refused(
    groups: tuple[int, ...], ports: list[Port], more: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        a_cluster(groups, ports, **more)


def test_cluster_with_neither_ports_nor_constants_is_refused() -> None:
    levels = (Level(name="node", groups=2, link_gb_per_s=1), Level(name="gpu", groups=4, link_gb_per_s=1))
    with pytest.raises(ValueError, match="level node needs alpha and beta of both inter and intra, or all levels need"):
        Cluster(name="bare", description="bare", levels=levels)
    with pytest.raises(ValueError, match="world needs alpha and beta"):
        Cluster(name="bare", description="bare", levels=levels[1:])


@pytest.mark.parametrize("name", PROFILES)
def test_profile_states_a_source_for_every_number_and_no_constant(name: str) -> None:
    text = (CONF / "cluster" / f"{name}.yaml").read_text()
    assert "from data sheets" in text.lower() and "alpha_ms" not in text
    cluster = Cluster.named(name)
    assert cluster.from_data_sheets and cluster.description.endswith("from data sheets")
    for peers in cluster.exchanges:
        constants = cluster.constants(peers)
        assert not constants.published and constants.source.startswith(DERIVED)
        assert 0 < constants.alpha_ms < 1 and constants.beta_ms_per_byte > 0
    assert all(level.port and len(level.port.source) > 10 for level in cluster.levels)


@pytest.mark.parametrize("name", MEASURED_INSIDE)
def test_port_that_was_measured_says_so_and_what_the_data_sheet_has(name: str) -> None:
    network, inside = (level.port for level in Cluster.named(name).levels)
    assert network and network.source.startswith("data sheet: ")
    assert inside and inside.source.startswith("measured: NCCL") and "aiconfigurator" in inside.source
    assert inside.gb_per_s < float(inside.source.partition("data sheet: ")[2].partition(";")[0])


@pytest.mark.parametrize("num_ranks", [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("name", PROFILES)
def test_profile_scales_to_any_power_of_two(name: str, num_ranks: int) -> None:
    cluster, small = scaled(Cluster.named(name), num_ranks), Cluster.named(name)
    assert cluster.hierarchy.num_ranks == num_ranks
    assert scaled(cluster, num_ranks) is cluster
    inner = {level.name: level for level in small.levels}
    for level in cluster.levels:
        if level.name in inner:
            assert level.port == inner[level.name].port
    sizes = [cluster.hierarchy.lanes(i) for i in range(1, cluster.hierarchy.depth + 1)]
    known = {level.name: small.hierarchy.lanes(i) for i, level in enumerate(small.levels, start=1)}
    assert all(known.get(level.name, n) == n for level, n in zip(cluster.levels, sizes, strict=True))


def test_cloud_grows_into_racks_and_pods() -> None:
    cluster = scaled(Cluster.named("cloud_eth100"), 1024)
    assert cluster.hierarchy.names == ("pod", "rack", "node", "socket", "gpu")
    assert cluster.hierarchy.groups == (4, 32, 128, 256, 1024)
    assert scaled(Cluster.named("cloud_eth100"), 64).hierarchy.names == ("rack", "node", "socket", "gpu")
    assert scaled(Cluster.named("h100_ib400"), 8).hierarchy.names == ("gpu",)
    assert scaled(Cluster.named("h100_ib400"), 1).hierarchy.groups == (1,)


def test_expert_parallel_group_sees_the_same_links_in_a_larger_cluster() -> None:
    """A card that eight GPUs share stays shared by eight, and nodes stay nodes."""
    small, large = (scaled(Cluster.named("cloud_eth100"), n) for n in (32, 128))
    assert small.constants(Peers("intra", 1)) == large.constants(Peers("intra", 2))
    assert small.constants(Peers("inter", 1)) == large.constants(Peers("inter", 2))


@pytest.mark.parametrize("first", [1, 8, 16, 64, 2048])
@pytest.mark.parametrize("name", PROFILES)
def test_scaling_twice_is_scaling_once(name: str, first: int) -> None:
    cluster = Cluster.named(name)
    for last in (4, 256, 1024):
        assert scaled(scaled(cluster, first), last) == scaled(cluster, last)


@pytest.mark.parametrize("num_ranks", [8, 16])
def test_part_of_the_testbed_has_the_constants_of_the_smaller_testbed(num_ranks: int) -> None:
    part, smaller = scaled(Cluster.named("a6000_4x8"), num_ranks), Cluster.named(f"a6000_{num_ranks // 8}x8")
    assert part.hierarchy == smaller.hierarchy and part.exchanges == smaller.exchanges
    for peers in part.exchanges:
        ours, theirs = part.constants(peers), smaller.constants(peers)
        assert (ours.alpha_ms, ours.published) == (theirs.alpha_ms, theirs.published)
        assert ours.beta_ms_per_byte == pytest.approx(theirs.beta_ms_per_byte, rel=1e-6)


@pytest.mark.parametrize("name", list(files_of("cluster")))
def test_sizes_that_a_message_names_work(name: str) -> None:
    cluster = Cluster.named(name)
    for num_ranks in range(1, cluster.hierarchy.num_ranks + 1):
        try:
            assert scaled(cluster, num_ranks).hierarchy.num_ranks == num_ranks
        except ValueError as error:
            for size in str(error).rpartition("take ")[2].split(" or "):
                assert scaled(cluster, int(size)).hierarchy.num_ranks == int(size)


@pytest.mark.parametrize(
    ("name", "num_ranks", "message"),
    [
        ("a6000_4x8", 64, "cluster a6000_4x8 has constants of its own for 32 GPUs"),
        (
            "h100_ib400",
            12,
            "12 GPUs do not fill whole groups of h100_ib400, whose .* room for 8 from the inside; take 8 or 16",
        ),
        ("cloud_eth100", 48, "room for 4, 2, 4, 8 from the inside; take 32 or 64"),
        ("a6000_4x8", 12, "room for 2, 2, 2, 4 from the inside; take 8 or 16"),
        ("h100_ib400", 0, "num_ranks=0 must be at least 1"),
    ],
)
def test_cluster_that_cannot_be_scaled_is_refused(name: str, num_ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaled(Cluster.named(name), num_ranks)


def test_outer_level_holds_at_least_two() -> None:
    with pytest.raises(ValueError, match="holds"):
        OuterLevel(name="rack", holds=1, port=port(1))
