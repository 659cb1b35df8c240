"""Table II: how often tokens would cross a link more than once."""

import csv
from pathlib import Path

import pytest
import torch

from hiermoe.planner.counts import count_routing
from hiermoe.routing.step import make_step
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement

PUBLISHED = Path(__file__).parents[2] / "results" / "published.csv"


def published_rates() -> dict[tuple[int, int], float]:
    with PUBLISHED.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["claim"].startswith("T2-")]
    rates = {}
    for row in rows:
        groups, topk = (int(part.split("=")[1]) for part in row["condition"].split())
        rates[groups, topk] = float(row["low"])
    return rates


@pytest.mark.parametrize("topk", [2, 4, 6, 8])
def test_uniform_routing_has_the_published_duplication_rates(topk: int) -> None:
    hierarchy = Hierarchy((4, 8, 16, 32))
    generator = torch.Generator().manual_seed(2508)
    ids_GTK = torch.rand(32, 1024, 128, generator=generator).topk(topk, dim=-1).indices
    step = make_step(ids_GTK, torch.full((32,), 1024), 128)
    counts = count_routing(step, Placement.identity(128), hierarchy)
    published = published_rates()
    assert len(published) == 16
    for level, groups in enumerate(hierarchy.groups, start=1):
        assert counts.duplication_rate(level) == pytest.approx(published[groups, topk], abs=0.02)
