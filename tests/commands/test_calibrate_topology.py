"""`hiermoe calibrate topology=...`: what nvidia-smi printed becomes a cluster that other commands take."""

from pathlib import Path

import pytest
import yaml

from hiermoe.topology.cluster import Cluster
from tests.conftest import Command
from tests.topology.test_node_links import PAIRS, SWITCHED


def test_links_become_a_cluster_that_a_run_takes(hiermoe: Command, clusters: Path, tmp_path: Path) -> None:
    file = tmp_path / "dgx.txt"
    file.write_text(SWITCHED)
    given = ("network_gbit_per_s=400", "nvlink_gb_per_s=25")
    code, out, err = hiermoe("calibrate", f"topology={file}", "nodes=4", *given)
    assert code == 0, err
    assert "cluster=dgx_x4" in out and "not measured" in out
    found = Cluster.model_validate(yaml.safe_load((clusters / "dgx_x4.yaml").read_text()))
    profile = Cluster.named("h100_ib400")
    assert found.from_data_sheets and found.exchanges == profile.exchanges
    for peers in profile.exchanges:  # the same links, read from a file and written by hand
        ours, theirs = found.constants(peers), profile.constants(peers)
        assert (ours.alpha_ms, ours.beta_ms_per_byte) == (theirs.alpha_ms, theirs.beta_ms_per_byte)
    code, out, err = hiermoe(
        "run", "cluster=dgx_x4", "model=qwen3_30b_a3b", "routing=uniform", "system=hd2", "iterations=2",
        "tokens_per_rank=64", "wandb.mode=disabled",
    )  # fmt: skip
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["topology=nowhere.txt"], "nowhere.txt"),
        (["topology={}", "nodes=4"], "say network_gbit_per_s="),
        (["topology={}", "nodes=0"], "nodes=0"),
        (["topology={}", "name=h100_ib400"], "is that cluster's file"),
        (["topology={}", "nvlinks=4"], "nvlink"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], message: str, hiermoe: Command, clusters: Path, tmp_path: Path
) -> None:
    (tmp_path / "node.txt").write_text(PAIRS)
    code, out, err = hiermoe("calibrate", *(one.format(tmp_path / "node.txt") for one in arguments))
    assert code == 2 and out == "" and message in err and len(err.strip().splitlines()) == 1
    assert not list(clusters.glob("*"))
