"""Megatron-LM's own training loop with experts that move: same losses, and checkpoints that it resumes without them."""

import importlib.util
import re
from datetime import timedelta
from typing import Any

import pytest

if importlib.util.find_spec("megatron.training") is None:
    pytest.skip("this version of megatron-core has no megatron.training: 0.19 and later do", allow_module_level=True)
pytest.importorskip("tensorboard", reason="what Megatron's scalars are written with")

from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
    EventAccumulator,
)

from hiermoe.dispatch.communicators import played_hosts
from hiermoe.ranks.launch import run_ranks
from hiermoe.ranks.server import RankFailedError, preload
from tests.megatron.pretrain_on_cpu import GAIN_MS, Run, cluster_of_ranks, train

preload(train.__module__)
ITERATIONS, SAVED, KILLED = 20, 10, 12
TIMEOUT, DEADLINE = timedelta(minutes=2), timedelta(minutes=5)
LINE = re.compile(
    r"experts moved after iteration (\d+): (\d+) in layer 1, (\d+) in layer 2 \| modelled gain (\S+) ms a step"
    r"(?: \| realised by the update before: (\S+) ms)? \| planning \S+ ms, migration \S+ ms, (\d+) bytes sent"
)


def start(run: Run) -> Run:
    """On four ranks, to the end."""
    run.folder.mkdir()
    run_ranks(train, 4, (run,), TIMEOUT, deadline=DEADLINE, hosts=played_hosts(cluster_of_ranks().hierarchy))
    return run


def scalars(run: Run) -> dict[str, dict[int, float]]:
    """What TensorBoard has, by name and iteration."""
    board = EventAccumulator(str(run.board))
    board.Reload()
    return {name: {event.step: event.value for event in board.Scalars(name)} for name in board.Tags()["scalars"]}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("pretrain")
    return start(Run(folder / "stock", folder / "checkpoints of stock", ITERATIONS))


@pytest.fixture(
    scope="module",
    params=[pytest.param(False, id="at once"), pytest.param(True, id="hidden, overlapped", marks=pytest.mark.slow)],
)
def killed(stock: Run, request: pytest.FixtureRequest) -> Run:
    folder = stock.folder.parent / ("hidden" if request.param else "at once")
    folder.mkdir()
    more: Any = {"moving": True, "hidden": request.param, "kill": (2, KILLED)}
    run = Run(folder / "killed", folder / "checkpoints", ITERATIONS, **more)
    with pytest.raises(RankFailedError, match="rank 2 of 4 died by signal SIGKILL"):
        start(run)
    return run


@pytest.fixture(scope="module")
def resumed(killed: Run) -> Run:
    more: Any = {"resumed": True, "hidden": killed.hidden}
    return start(Run(killed.folder.parent / "resumed", killed.checkpoints, ITERATIONS, **more))


def moved_after(run: Run) -> list[int]:
    """The iterations after which experts moved, but for what the rank did not live to see."""
    # What is on its way when a checkpoint is saved stays.
    return [2, 4, 7, 9] if run.hidden else list(range(1, KILLED))


def test_losses_are_those_of_stock_flags_until_the_kill_and_after_stock_has_resumed(
    stock: Run, killed: Run, resumed: Run
) -> None:
    expected = stock.losses()
    assert list(expected) == list(range(1, ITERATIONS + 1)) and expected[ITERATIONS] != pytest.approx(expected[1])
    assert list(killed.losses()) == list(range(1, KILLED + 1))
    assert list(resumed.losses()) == list(range(SAVED + 1, ITERATIONS + 1))
    for run in (killed, resumed):
        for iteration, loss in run.losses().items():
            # In float64: where the order of sums differs, that is 1e-16 of a gradient, and Adam's steps amplify it.
            assert loss == pytest.approx(expected[iteration], rel=1e-12), (run.folder.name, iteration)


def test_evaluation_gives_the_same_and_moves_nothing(stock: Run, killed: Run, resumed: Run) -> None:
    expected, before, after = (scalars(run)["lm loss validation"] for run in (stock, killed, resumed))
    assert list(expected) == [10, 20] and list(before) == [10] and list(after) == [20]
    assert before | after == pytest.approx(expected, rel=1e-6)  # float32, which TensorBoard writes
    assert "experts moved" not in stock.log.read_text() + resumed.log.read_text()


def test_a_line_of_the_log_says_what_moved(killed: Run) -> None:
    lines = [LINE.search(line) for line in killed.log.read_text().splitlines() if "experts moved" in line]
    numbers = []
    for line in lines:
        assert line is not None
        number, *moved = map(int, line.group(1, 2, 3))
        numbers.append(number)
        assert all(0 < count <= 32 for count in moved)
        assert float(line[4]) == 2 * GAIN_MS and int(line[6]) > 0
        assert (line[5] is None) == (len(numbers) < (2 if killed.hidden else 3)), number
    assert numbers == moved_after(killed)


def test_scalars_are_where_megatron_writes_its_own(killed: Run, resumed: Run) -> None:
    found = scalars(killed)
    assert "lm loss" in found
    for name in ("moved_experts", "sent_bytes", "planning_ms", "migration_ms", "modelled_gain_ms"):
        values = {number: value for number, value in found[f"hiermoe/{name}"].items() if number <= SAVED}
        assert list(values) == [number for number in moved_after(killed) if number <= SAVED], name
        assert all(value > 0 for value in values.values()), name
    assert not [name for name in scalars(resumed) if name.startswith("hiermoe")]
