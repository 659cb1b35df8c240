"""`hiermoe calibrate from=...`: files of nccl-tests become a cluster that other commands take."""

from pathlib import Path

import pytest
import yaml

from hiermoe.runs.calibration_files import NOT_MEASURED, commands
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import Peers
from tests.conftest import Command
from tests.topology.nccl_logs import groups_of, json_log, text_log

HALF = 2.0  # the made-up node is so many times as slow as the profile's


def logs(folder: Path) -> list[Path]:
    """World and node of h100_ib400, the node slower; nothing among nodes alone."""
    cluster = Cluster.named("h100_ib400")
    world, intra = Peers("intra", 0), Peers("intra", 1)
    slower = cluster.constants(intra).times(1, HALF)
    return [
        text_log(folder / "world.log", cluster.constants(world).ms, groups_of(world, cluster.hierarchy)),
        json_log(folder / "node.json", slower.ms, [0] * 8),
    ]


def test_files_become_a_cluster_and_what_they_lack_is_marked(hiermoe: Command, clusters: Path, tmp_path: Path) -> None:
    world, node = logs(tmp_path)
    code, out, err = hiermoe("calibrate", f"from=[{world},{node}]", "cluster=h100_ib400", "name=ours")
    assert code == 0, err
    assert "not measured, taken from h100_ib400 and marked: inter1" in " ".join(out.split())
    assert (clusters / "ours.png").exists()
    cluster = Cluster.model_validate(yaml.safe_load((clusters / "ours.yaml").read_text()))
    profile = Cluster.named("h100_ib400")
    for peers, factor in ((Peers("intra", 0), 1.0), (Peers("inter", 1), 1.0), (Peers("intra", 1), HALF)):
        ours, theirs = cluster.constants(peers), profile.constants(peers)
        assert ours.beta_ms_per_byte == pytest.approx(factor * theirs.beta_ms_per_byte, rel=0.01)
        assert ours.source.startswith(NOT_MEASURED) == (peers.kind == "inter") and not ours.published
    code, out, err = hiermoe(
        "run", "cluster=ours", "model=qwen3_30b_a3b", "routing=uniform", "system=hd2", "iterations=2",
        "tokens_per_rank=64", "wandb.mode=disabled",
    )  # fmt: skip
    assert code == 0, err


def test_the_alltoall_may_be_said(hiermoe: Command, clusters: Path, tmp_path: Path) -> None:
    _, node = logs(tmp_path)
    code, _, err = hiermoe("calibrate", f"from={{intra1:{node}}}", "cluster=h100_ib400")
    assert code == 0, err
    assert (clusters / "h100_ib400_nccl_tests.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["from=nowhere.log", "cluster=h100_ib400"], "nowhere.log"),
        (["from=nowhere.log"], "cluster=... is missing"),
        (["from=nowhere.log", "cluster=h100_ib400", "name=h100_ib400"], "is that cluster's file"),
        (["from=nowhere.log", "cluster=h100_ib400", "repeats=3"], "repeats"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: list[str], message: str, hiermoe: Command, clusters: Path) -> None:
    code, out, err = hiermoe("calibrate", *arguments)
    assert code == 2 and out == "" and message in err and len(err.strip().splitlines()) == 1
    assert not list(clusters.glob("*"))


@pytest.mark.parametrize("name", ["h100_ib400", "gb200_nvl72_ib400", "a6000_4x8"])
def test_commands_split_ranks_as_the_alltoalls_do(name: str, hiermoe: Command) -> None:
    cluster = Cluster.named(name)
    code, out, _ = hiermoe("calibrate", "--commands", f"cluster={name}")
    assert code == 0
    for peers, command in commands(cluster):
        assert command in " ".join(out.split("\n"))
        operation, _, value = command.partition('NCCL_TESTS_SPLIT="')[2].partition('"')[0].partition(" ")
        colour = {
            "": lambda rank, _: 0,
            "DIV": lambda rank, by: rank // by,
            "MOD": lambda rank, by: rank % by,
            "AND": lambda rank, by: rank & by,
        }[operation]
        number = int(value or "0", 0)
        colours = [colour(rank, number) for rank in range(cluster.hierarchy.num_ranks)]
        for rank, own in enumerate(colours):
            together = tuple(other for other, its in enumerate(colours) if its == own)
            assert together == peers.members(rank, cluster.hierarchy)
