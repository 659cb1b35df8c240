"""Clusters hold the published constants and nothing that was made up without saying so."""

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from hiermoe.records.project import CONF, PROJECT_ROOT
from hiermoe.topology.cluster import AlphaBeta, Cluster, Level, Peers

FILES = sorted((CONF / "cluster").glob("*.yaml"))
WORLD, INTER, INTRA = (Peers("world"), *([Peers(kind, i) for i in (0, 1, 2, 3)] for kind in ("inter", "intra")))
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
    with (PROJECT_ROOT / "results" / "published.csv").open(newline="") as file:
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
