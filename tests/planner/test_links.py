"""What the links between groups carry in a stage."""

import math

import pytest
import torch

from hiermoe.planner.links import busiest_link_bytes, link_ms
from hiermoe.topology.cluster import Cluster


def test_a_link_carries_what_leaves_its_group_or_enters_it_and_nothing_else() -> None:
    rows_SGG = torch.zeros(2, 4, 4, dtype=torch.int64)
    rows_SGG[0] = torch.tensor([[9, 9, 1, 2], [9, 9, 3, 0], [5, 0, 9, 9], [0, 0, 9, 9]])
    rows_SGG[1, 3, 0], rows_SGG[1, 2, 0] = 7, 4  # more comes into GPU 0 than any GPU sends
    # Two groups of two: 0 -> 1 carries 1 + 2 + 3, 1 -> 0 carries 5; each way is a link of its own.
    assert busiest_link_bytes(rows_SGG, 2, 10).tolist() == [60, 110]
    # Single GPUs: into GPU 0 come 9 + 5, out of it go 9 + 1 + 2; GPU 1 gets 9 and sends 9 + 3, GPU 2 sends 5 + 9.
    assert busiest_link_bytes(rows_SGG, 1, 1).tolist() == [14, 11]


def test_least_time_of_a_stage_is_that_of_its_slowest_link() -> None:
    cluster = Cluster.named("emulated_4x8")
    node, half = cluster.shaped_rates
    rows_SGG = torch.zeros(3, 32, 32, dtype=torch.int64)
    rows_SGG[0, :8, 8:16] = 1  # 64 rows leave a node, 32 of them each of its halves; they enter one node
    rows_SGG[1, 0:4, 4:8] = 100  # between the halves of a node
    rows_SGG[2, 0, 1] = 1000  # inside a half no link is shaped
    found = link_ms(rows_SGG, cluster, 1000)
    assert found == pytest.approx([64_000 * 8 / (node * 1e3), 1_600_000 * 8 / (half * 1e3), 0.0])


def test_without_shaped_links_there_is_no_least_time() -> None:
    found = link_ms(torch.ones(2, 32, 32, dtype=torch.int64), Cluster.named("a6000_4x8"), 1)
    assert len(found) == 2 and all(math.isnan(x) for x in found)
