"""Clusters hold the published constants and nothing that was made up without saying so."""

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from hiermoe.records.project import CONF, PUBLISHED
from hiermoe.topology.cluster import Cluster, Level
from hiermoe.topology.peers import WORLD, AlphaBeta, Peers

FILES = sorted((CONF / "cluster").glob("*.yaml"))
INTER, INTRA = ([Peers(kind, i) for i in (0, 1, 2, 3)] for kind in ("inter", "intra"))
# Which published row each constant is, and what its beta is scaled by (one of two nodes instead of three of four).
EXPECTED: dict[str, dict[Peers, tuple[str, float]]] = {
    "a6000_4x8": {
        WORLD: ("F9-a2a", 1),
        INTER[1]: ("F9-inter1", 1),
        INTRA[1]: ("F9-intra1", 1),
        INTER[2]: ("F9-inter2", 1),
        INTRA[2]: ("F9-intra2", 1),
        INTER[3]: ("F9-inter3", 1),
        INTRA[3]: ("F9-intra3", 1),
    },
    "a6000_2x8": {
        WORLD: ("F9-a2a", 2 / 3),
        INTER[1]: ("F9-inter1", 2 / 3),
        INTRA[1]: ("F9-intra1", 1),
        INTER[2]: ("F9-inter2", 1),
        INTRA[2]: ("F9-intra2", 1),
        INTER[3]: ("F9-inter3", 1),
        INTRA[3]: ("F9-intra3", 1),
    },
    "a6000_1x8": {
        WORLD: ("F9-intra1", 1),
        INTER[1]: ("F9-inter2", 1),
        INTRA[1]: ("F9-intra2", 1),
        INTER[2]: ("F9-inter3", 1),
        INTRA[2]: ("F9-intra3", 1),
    },
}
CASES = [(name, peers, row, scale) for name, rows in EXPECTED.items() for peers, (row, scale) in rows.items()]


def load(name: str) -> Cluster:
    return Cluster(**yaml.safe_load((CONF / "cluster" / f"{name}.yaml").read_text()))


def published() -> dict[str, tuple[float, float]]:
    with PUBLISHED.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "alpha_ms;beta_ms_per_byte"]
    return {row["claim"]: (float(row["low"]), float(row["high"])) for row in rows}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_cluster_file_loads_and_says_what_it_is(file: Path) -> None:
    assert file.read_text().startswith("# ")
    cluster = load(file.stem)
    assert cluster.name == file.stem
    assert cluster.hierarchy.num_ranks == cluster.levels[-1].groups


@pytest.mark.parametrize(("name", "peers", "row", "scale"), CASES, ids=lambda value: str(value))
def test_constants_are_the_published_ones(name: str, peers: Peers, row: str, scale: float) -> None:
    alpha_ms, beta_ms_per_byte = published()[row]
    constants = load(name).constants(peers)
    assert constants.alpha_ms == alpha_ms
    assert constants.beta_ms_per_byte == pytest.approx(beta_ms_per_byte * scale, rel=1e-6)
    assert constants.published == (scale == 1)


@pytest.mark.parametrize("name", EXPECTED)
def test_no_constant_is_left_unchecked(name: str) -> None:
    cluster = load(name)
    inner = range(1, cluster.hierarchy.depth)
    stages = {INTER[i] for i in inner} | {INTRA[i] for i in inner}
    assert {WORLD, *stages} == set(EXPECTED[name])


def test_paper_testbed_has_four_levels() -> None:
    cluster = load("a6000_4x8")
    assert cluster.hierarchy.U == (1, 4, 8, 16, 32)
    assert cluster.hierarchy.names == ("node", "half", "pair", "gpu")


def test_peers_of_a_stage_count_as_the_paper_says() -> None:
    hierarchy = load("a6000_4x8").hierarchy
    assert WORLD.size(hierarchy) == 32
    assert [INTER[i].size(hierarchy) for i in (1, 2, 3)] == [4, 2, 2]
    assert [INTRA[i].size(hierarchy) for i in (1, 2, 3)] == [8, 4, 2]
    assert [str(peers) for peers in (WORLD, INTER[1], INTRA[3])] == ["world", "inter1", "intra3"]


def test_stage_without_constants_is_refused() -> None:
    with pytest.raises(ValueError, match="cluster a6000_4x8 has no constants for inter4"):
        load("a6000_4x8").constants(Peers("inter", 4))


LINE = AlphaBeta(alpha_ms=1.0, beta_ms_per_byte=1e-7, source="made up")
NODE = Level(name="node", groups=2, link_gb_per_s=25.0, inter=LINE, intra=LINE)
GPU = Level(name="gpu", groups=4, link_gb_per_s=50.0)


def a_cluster(*levels: Level) -> Cluster:
    return Cluster(name="made_up", description="two nodes of two GPUs", world=LINE, levels=levels)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((), "at least 1"),
        ((NODE.model_copy(update={"intra": None}), GPU), "level node needs alpha and beta of both inter and intra"),
        ((NODE.model_copy(update={"inter": None}), GPU), "level node needs alpha and beta of both inter and intra"),
        ((NODE, GPU.model_copy(update={"intra": LINE})), "innermost level gpu: its exchange is the intra of the level"),
        ((NODE, GPU.model_copy(update={"groups": 3})), "3 groups do not split 2 groups evenly"),
    ],
)
def test_incomplete_cluster_is_refused(levels: tuple[Level, ...], message: str) -> None:
    assert a_cluster(NODE, GPU).hierarchy.groups == (2, 4)
    with pytest.raises(ValueError, match=message):
        a_cluster(*levels)


@pytest.mark.parametrize("changes", [{"alpha_ms": -1.0}, {"beta_ms_per_byte": -1e-9}, {"source": None}, {"gamma": 1.0}])
def test_constants_that_break_a_rule_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        AlphaBeta(**(LINE.model_dump() | changes))


def test_link_without_speed_is_refused() -> None:
    with pytest.raises(ValueError, match="link_gb_per_s"):
        Level(name="gpu", groups=4, link_gb_per_s=0.0)


def test_shaped_level_inside_an_unshaped_one_is_refused() -> None:
    with pytest.raises(ValueError, match="level gpu is shaped, but node around it is not"):
        a_cluster(NODE, GPU.model_copy(update={"shaped_mbit_per_s": 100.0}))


SLOWDOWN = {"emulated_4x8": 1125, "emulated_4x2": 450}  # of the emulated links against the paper's


@pytest.mark.parametrize("name", ["emulated_4x8", "emulated_4x2"])
def test_emulated_links_are_the_papers_slowed_down_alike(name: str) -> None:
    """A link carries what its GPUs send over it in the published time of the exchange that crosses it."""
    cluster, paper = load(name), load("a6000_4x8")
    for level, rate in enumerate(cluster.shaped_rates, start=1):
        published_beta = paper.constants(INTER[level]).beta_ms_per_byte
        siblings, lanes = INTER[level].size(paper.hierarchy), paper.hierarchy.lanes(level)
        bytes_per_ms = lanes * (1 - 1 / siblings) / published_beta
        assert rate == pytest.approx(bytes_per_ms * 8 / 1e3 / SLOWDOWN[name], rel=1e-3)


@pytest.mark.parametrize("name", ["emulated_4x8", "emulated_4x2"])
def test_derived_constants_are_what_emulated_links_allow(name: str) -> None:
    cluster = load(name)
    hierarchy = cluster.hierarchy
    crossed = {WORLD: 1} | {
        peers: level for level in range(1, len(cluster.shaped_rates) + 1) for peers in (INTER[level], INTRA[level - 1])
    }
    for peers, level in crossed.items():
        if peers == INTRA[0]:
            continue
        siblings = hierarchy.U[level] // hierarchy.U[level - 1]
        crossing = hierarchy.lanes(level) * (1 - 1 / siblings)
        bytes_per_ms = cluster.shaped_rates[level - 1] / 8 * 1e3
        assert cluster.constants(peers).beta_ms_per_byte == pytest.approx(crossing / bytes_per_ms, rel=1e-3)
        assert not cluster.constants(peers).published


def test_cluster_is_found_by_its_file_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((CONF / "cluster" / "a6000_1x8.yaml").read_text().replace("name: a6000_1x8", "name: mine"))
    assert Cluster.named(str(path)).name == "mine"
    with pytest.raises(ValueError, match=r"cluster=nothing is unknown; choose from a100_ib200, a6000_1x8, "):
        Cluster.named("nothing")
