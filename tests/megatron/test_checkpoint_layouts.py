"""A checkpoint of moved experts is one of the whole model: it loads under any other layout, in stock Megatron or not.

But for EP 1: there Megatron has one optimizer instead of two, which does not find what two have saved.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from hiermoe.dispatch.communicators import HOST_VARIABLE, played_hosts
from hiermoe.policies.system import SystemConfig
from hiermoe.ranks.launch import run_ranks
from hiermoe.topology.cluster import Cluster
from tests.megatron.logical_state import Piece, assembled, pieces
from tests.megatron.moving import DEADLINE, TIMEOUT, system
from tests.megatron.parallel_model import SEQUENCE, VOCABULARY, ParallelModel

RANKS, STEPS = 4, 1
DENSE_FIRST = [0, 1, 1, 1]
LAYOUTS: dict[str, dict[str, Any]] = {
    "EP4": {"ep_size": 4},
    "EP2": {"ep_size": 2},
    "TP2 EP4": {"ep_size": 4, "tensor": 2},
    "PP2 EP2": {"ep_size": 2, "stages": 2},
    "PP2 VPP2 EP2": {"ep_size": 2, "stages": 2, "virtual": 2},
    "TP2 PP2 EP2": {"ep_size": 2, "stages": 2, "tensor": 2},
}
MOVED, SWAPPED, HIERMOE = system("Shuffle", "hd1"), system("Swap", "hd1"), "hiermoe"
SYSTEMS: dict[str, SystemConfig | str | None] = {"stock": None, "moved": MOVED, "swapped": SWAPPED, "hiermoe": HIERMOE}


class Way(NamedTuple):
    """A checkpoint that one layout and system writes, and those that read it: pairs of both, by name."""

    written: tuple[str, str]
    read: tuple[tuple[str, str], ...]


def started(layout: str, name: str, distributed: bool, grouped: bool) -> tuple[ParallelModel, Any]:
    """A model and where its experts are; None in stock Megatron."""
    from hiermoe.megatron.attach import attach

    fields: dict[str, Any] = {"stages": 1} | LAYOUTS[layout]
    model = ParallelModel(DENSE_FIRST, distributed=distributed, grouped=grouped, **fields)
    chosen = SYSTEMS[name]
    if chosen is None:
        return model, None
    cluster = Cluster.named("a6000_4x8").reduced(fields["ep_size"])
    hosts = played_hosts(cluster.hierarchy)
    os.environ[HOST_VARIABLE] = hosts[torch.distributed.get_rank() % len(hosts)]
    return model, attach([*model.chunks], chosen, cluster, timeout=TIMEOUT)


def train(model: ParallelModel, placement: Any, steps: int, seed: int) -> int:
    """Number of experts that moved."""
    from megatron.core import parallel_state

    generator = torch.Generator().manual_seed(100 * seed + parallel_state.get_data_parallel_rank())
    moved = 0
    for _ in range(steps):
        model.step(torch.randint(VOCABULARY, (2, 2, SEQUENCE), generator=generator))
        if placement is not None:
            moved += sum(update.moved_experts for update in placement.step(model.optimizer))
    return moved


def slots(placement: Any) -> dict[int, list[int]]:
    """Where the experts of this rank's layers are, by layer."""
    layers = [] if placement is None else placement.layers
    return {x.number: x.dispatcher.placement.slot_E.tolist() for x in layers}


def write_and_read(rank: int, ways: list[Way], distributed: bool, grouped: bool, folder: Path) -> dict[Any, Any]:
    from hiermoe.megatron.checkpoint import load_latest, save_checkpoint

    seen: dict[Any, Any] = {}
    for number, way in enumerate(ways):
        model, placement = started(*way.written, distributed, grouped)
        train(model, placement, STEPS, seed=1)
        with model.precision():
            save_checkpoint(folder / str(number), STEPS, [*model.chunks], model.optimizer, model.schedule, placement)
        seen[number] = {"pieces": pieces(model), "slots": slots(placement)}
        for reader in way.read:
            model, placement = started(*reader, distributed, grouped)
            train(model, placement, 1, seed=2)  # something else, with experts somewhere else
            with model.precision():
                step = load_latest(folder / str(number), [*model.chunks], model.optimizer, model.schedule, placement)
            assert step == STEPS
            seen[number, reader] = {"pieces": pieces(model), "slots": slots(placement)}
            train(model, placement, 1, seed=3)  # goes on
    return seen


def check(ways: list[Way], distributed: bool, grouped: bool, folder: Path) -> None:
    arguments = (ways, distributed, grouped, folder)
    ranks = run_ranks(write_and_read, RANKS, arguments, TIMEOUT, deadline=DEADLINE)

    def whole(key: Any) -> dict[str, torch.Tensor]:
        found: list[list[Piece]] = [rank[key]["pieces"] for rank in ranks]
        return assembled(found)

    for number, way in enumerate(ways):
        expected = whole(number)
        kinds = {name.split()[-1] for name in expected}
        assert kinds == {"weight", "exp_avg", "exp_avg_sq"} | ({"param"} if distributed else set())
        assert len([name for name in expected if ".experts." in name and name.endswith("weight")]) == 2 * 8 * 3
        placed = {layer: where for rank in ranks for layer, where in rank[number]["slots"].items()}
        moved = way.written[1] in ("moved", "swapped")
        assert sorted(placed) == ([2, 3, 4] if moved else []) and list(range(8)) not in placed.values()
        for reader in way.read:
            found = whole((number, reader))
            assert found.keys() == expected.keys(), (way, reader)
            wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
            assert not wrong, (way, reader, wrong)
            if moved and reader[1] != "stock":
                there = {layer: where for rank in ranks for layer, where in rank[number, reader]["slots"].items()}
                assert there == placed, (way, reader)


@pytest.mark.slow
@pytest.mark.settings
def test_moved_experts_load_in_stock_megatron_under_another_layout(tmp_path: Path) -> None:
    check([Way(("EP4", "moved"), (("TP2 PP2 EP2", "stock"),))], True, False, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "distributed"),
    [
        (Way(("EP4", "moved"), (("EP2", "stock"), ("TP2 EP4", "stock"), ("PP2 EP2", "stock"))), False),
        (Way(("PP2 VPP2 EP2", "moved"), (("EP4", "stock"), ("TP2 PP2 EP2", "stock"))), True),
        (Way(("TP2 PP2 EP2", "swapped"), (("EP4", "stock"), ("EP4", "moved"), ("PP2 VPP2 EP2", "swapped"))), False),
        (Way(("EP4", "moved"), (("EP2", "hiermoe"), ("TP2 PP2 EP2", "swapped"), ("PP2 VPP2 EP2", "moved"))), True),
        (Way(("TP2 PP2 EP2", "stock"), (("EP4", "moved"), ("EP2", "swapped"), ("PP2 VPP2 EP2", "moved"))), True),
    ],
    ids=lambda one: f"{one.written[1]} {one.written[0]}" if isinstance(one, Way) else ("whole", "divided")[one],
)
def test_a_checkpoint_of_any_layout_loads_under_any_other(way: Way, distributed: bool, tmp_path: Path) -> None:
    check([way], distributed, False, tmp_path)


@pytest.mark.slow
def test_grouped_experts_too(tmp_path: Path) -> None:
    ways = [
        Way(("EP4", "moved"), (("PP2 VPP2 EP2", "stock"), ("EP2", "swapped"))),
        Way(("PP2 EP2", "stock"), (("EP4", "moved"),)),
    ]
    check(ways, True, True, tmp_path)
