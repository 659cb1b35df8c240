"""From files of nccl-tests to the AlltoAlls of a cluster: a simulated log of a known cluster gives it back."""

from pathlib import Path

import numpy as np
import pytest

from hiermoe.planner.nccl_exchanges import fit_exchanges_of
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import Peers
from tests.topology.nccl_logs import groups_of, json_log, text_log

INTER, INTRA = Peers("inter", 1), Peers("intra", 1)


@pytest.mark.parametrize("name", ["h100_ib400", "a6000_4x8", "gb200_nvl72_ib400", "emulated_4x2"])
@pytest.mark.parametrize("log", [text_log, json_log])
def test_logs_of_every_alltoall_give_the_cluster_back(name: str, log: object, tmp_path: Path) -> None:
    cluster = Cluster.named(name)
    host = cluster.hierarchy.lanes(cluster.hierarchy.depth - 1)
    files = [
        (None, log(tmp_path / f"{peers}.log", cluster.constants(peers).ms, groups_of(peers, cluster.hierarchy), host))  # type: ignore[operator]
        for peers in reversed(cluster.exchanges)
    ]
    exchanges, notes = fit_exchanges_of(files, cluster)
    assert [one.peers for one in exchanges] == [*cluster.exchanges] and not notes
    for one in exchanges:
        truth = cluster.constants(one.peers)
        assert one.constants.alpha_ms == pytest.approx(truth.alpha_ms, rel=0.02, abs=1e-5)
        assert one.constants.beta_ms_per_byte == pytest.approx(truth.beta_ms_per_byte, rel=0.01)
        assert one.constants.bends == () and f"{one.peers}.log" in one.constants.source


@pytest.mark.parametrize("nodes", [2, 3, 10])
@pytest.mark.parametrize("split", [False, True])
def test_other_numbers_of_nodes_are_brought_to_the_clusters(nodes: int, split: bool, tmp_path: Path) -> None:
    cluster, peers = Cluster.named("h100_ib400"), INTER if split else Peers("intra", 0)
    groups = [rank % 8 if split else 0 for rank in range(8 * nodes)]
    measured = 1 - 1 / nodes  # share of the bytes that leaves a node
    path = text_log(tmp_path / "a.log", lambda size: 0.03 + size * 2e-8 * measured, groups)
    ((one,), _) = fit_exchanges_of([(None, path)], cluster)
    assert one.peers == peers
    assert one.constants.beta_ms_per_byte == pytest.approx(2e-8 * 0.75, rel=0.01)
    assert one.constants.alpha_ms == pytest.approx(0.03, rel=0.02) and "the share of" in one.constants.source


def test_of_several_numbers_of_nodes_the_nearest_counts_and_files_of_one_are_put_together(tmp_path: Path) -> None:
    cluster = Cluster.named("h100_ib400")
    small, large = (tuple(2**n for n in powers) for powers in (range(10, 20), range(20, 31)))
    files = [
        text_log(tmp_path / "two.log", lambda size: 1.0 + size * 1e-8, [0] * 16),
        text_log(tmp_path / "small.log", lambda size: 0.03 + size * 2e-8, [0] * 32, sizes=small),
        text_log(tmp_path / "large.log", lambda size: 0.03 + size * 2e-8, [0] * 32, sizes=large),
    ]
    ((one,), notes) = fit_exchanges_of([(None, path) for path in files], cluster)
    assert len(one.size_bytes) == len(small) + len(large)
    assert one.constants.beta_ms_per_byte == pytest.approx(2e-8, rel=0.01)
    assert notes == ["world: of 16 GPUs, left out for 32"]


def unlisted(path: Path) -> Path:
    """A log without its ranks."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "Rank" not in line))
    return path


def test_a_file_without_ranks_is_of_what_is_said(tmp_path: Path) -> None:
    cluster = Cluster.named("h100_ib400")
    path = unlisted(text_log(tmp_path / "a.log", cluster.constants(INTRA).ms, [0] * 8))
    ((one,), _) = fit_exchanges_of([("intra1", path)], cluster)
    assert one.peers == INTRA
    np.testing.assert_allclose(one.constants.beta_ms_per_byte, cluster.constants(INTRA).beta_ms_per_byte, rtol=0.01)
    with pytest.raises(ValueError, match=r"lists no ranks.*from=\{NAME:.*world, inter1, intra1"):
        fit_exchanges_of([(None, path)], cluster)
    with pytest.raises(ValueError, match=r"from.intra7: h100_ib400 has no such AlltoAll; choose from world, inter1, "):
        fit_exchanges_of([("intra7", path)], cluster)


@pytest.mark.parametrize(
    ("groups", "per_host", "said", "message"),
    [
        ([0], 8, None, "1 GPU exchanges with itself alone"),
        ([0] * 12, 8, None, "hosts with 4, 8 GPUs"),
        ([0] * 16, 4, None, "hosts with 4 GPUs; groups of h100_ib400 have 32, 8, 1: name a cluster with such hosts"),
        ([0] * 4, 8, None, "ranks 0, 1, 2, 3 exchange, which is no AlltoAll of h100_ib400"),
        ([0, 0, 0, 1, 1, 0, 0, 0], 8, None, "is no AlltoAll of h100_ib400"),
        ([0] * 8, 8, "inter1", "is of intra1 by its ranks, not of inter1"),
    ],
)
def test_what_is_no_alltoall_of_the_cluster(
    groups: list[int], per_host: int, said: str | None, message: str, tmp_path: Path
) -> None:
    path = text_log(tmp_path / "a.log", lambda size: 0.03 + size * 2e-8, groups, per_host)
    with pytest.raises(ValueError, match=message):
        fit_exchanges_of([(said, path)], Cluster.named("h100_ib400"))


def test_hosts_that_are_mixed_are_refused(tmp_path: Path) -> None:
    path = text_log(tmp_path / "a.log", lambda size: 0.03 + size * 2e-8, [0] * 16)
    path.write_text(path.read_text().replace("on host0 device  5", "on host1 device  5"))
    with pytest.raises(ValueError, match="do not follow one another; start them node by node"):
        fit_exchanges_of([(None, path)], Cluster.named("h100_ib400"))
