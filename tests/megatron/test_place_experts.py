"""What `place_experts` wraps in Megatron's training loop, and what it refuses; the loop here is a stand-in."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hiermoe.megatron.standins import cpu

cpu.expect_fallbacks()

from hiermoe.megatron import pretrain  # noqa: E402
from hiermoe.megatron.pretrain import IterationTimes, Moved, place_experts  # noqa: E402
from hiermoe.topology.placement import Placement  # noqa: E402

CALLED = ("hiermoe", "a6000_4x8")
REPORT: Any = pretrain._report


class Placed:
    """Stands in for what `attach` returns."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.layers = [SimpleNamespace(number=3, dispatcher=SimpleNamespace(placement=Placement.identity(8)))]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.events.append(("begins at", state["iteration"]))

    def step(self, optimizer: Any) -> list[Any]:
        self.events.append(("step", optimizer))
        return []

    def go_home(self, optimizer: Any) -> None:
        self.events.append(("home", optimizer))

    def move_to(self, placements: dict[int, Placement], optimizer: Any) -> None:
        self.events.append(("back", list(placements), optimizer))


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A training loop with what is wrapped; its ``exits`` is what a step says of exiting."""
    loop, variables = ModuleType("megatron.training.training"), ModuleType("megatron.training.global_vars")
    args = SimpleNamespace(iteration=7, curr_iteration=7, distributed_timeout_minutes=1)
    made: Any = loop
    made.exits, made.placed, made.args = False, Placed(), args
    made.setup_model_and_optimizer = lambda model_type, **more: (["model"], "optimizer", "scheduler")
    made.train_step = lambda forward, data, model, optimizer, scheduler: ({}, 1, False, made.exits, 0, None, None, 0)

    def save_checkpoint(iteration: int, model: Any, optimizer: Any, scheduler: Any) -> None:
        made.placed.events.append(("save", iteration))

    made.save_checkpoint = save_checkpoint
    named: Any = variables
    named.get_args = lambda: args
    for module in (loop, variables):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(pretrain, "attach", lambda *_a, **_k: made.placed)
    monkeypatch.setattr(pretrain, "_report", lambda *_a: None)
    return loop


def run(loop: Any) -> list[Any]:
    """One iteration and a checkpoint, as Megatron calls them."""
    assert loop.setup_model_and_optimizer("type", cfg_container=None) == (["model"], "optimizer", "scheduler")
    loop.train_step("forward", "data", ["model"], "optimizer", scheduler="scheduler")
    loop.save_checkpoint(8, ["model"], optimizer="optimizer", scheduler="scheduler")
    return loop.placed.events


def test_a_step_follows_every_iteration_and_experts_are_at_home_in_every_checkpoint(loop: Any) -> None:
    place_experts(*CALLED)
    around = [("home", "optimizer"), ("save", 8), ("back", [3], "optimizer")]
    assert run(loop) == [("begins at", 7), ("step", "optimizer"), *around]


def test_nothing_moves_where_megatron_is_about_to_exit(loop: Any) -> None:
    loop.exits = True
    place_experts(*CALLED)
    assert "step" not in [event[0] for event in run(loop)]


def test_one_system_in_a_process(loop: Any) -> None:
    place_experts(*CALLED)
    with pytest.raises(RuntimeError, match="has been called already"):
        place_experts(*CALLED)


@pytest.mark.parametrize("name", ["setup_model_and_optimizer", "train_step", "save_checkpoint"])
def test_another_version_of_the_loop_is_refused_by_name(loop: Any, name: str) -> None:
    delattr(loop, name)
    with pytest.raises(RuntimeError, match=rf"of this version has no {name}\("):
        place_experts(*CALLED)


def test_a_step_without_an_optimizer_among_its_arguments_is_refused(loop: Any) -> None:
    loop.train_step = lambda forward, data, model: None
    with pytest.raises(RuntimeError, match=r"has no train_step\(optimizer\)"):
        place_experts(*CALLED)


def test_a_megatron_without_its_training_loop_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.training.training", None)
    with pytest.raises(RuntimeError, match=r"megatron\.training\.training cannot be imported"):
        place_experts(*CALLED)


def test_settings_without_a_test_are_refused(loop: Any) -> None:
    place_experts(*CALLED)
    loop.args.perform_rl_step = True
    with pytest.raises(ValueError, match="perform_rl_step is not supported where experts move"):
        loop.setup_model_and_optimizer("type")


def test_a_system_that_does_not_exist_is_refused_before_anything_starts(loop: Any) -> None:
    with pytest.raises(ValueError, match="no_such_system"):
        place_experts("no_such_system", "a6000_4x8")


def test_a_system_that_moves_nothing_reports_nothing(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(pretrain, "_report", lambda *arguments: reported.append(arguments))
    place_experts("hd_moe", "a6000_4x8")  # of whose report stages of a pipeline would tell one another
    run(loop)
    assert not reported


def test_what_an_update_has_realised_is_told_with_the_next() -> None:
    times = IterationTimes()
    times.add(500.0)  # the first one sets much up
    assert times.moved() is None
    for ms in (10.0, 11.0, 90.0):
        times.add(ms)
    assert times.moved() is None  # nothing is known of before the first update
    for ms in (7.0, 8.0, 9.0):
        times.add(ms)
    assert times.moved() == 11.0 - 8.0
    times.add(12.0)
    assert times.moved() == 8.0 - 12.0


@pytest.fixture
def writers(loop: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Megatron's, none of them on; and what has moved on all ranks."""
    variables: Any = sys.modules["megatron.training.global_vars"]
    variables.get_tensorboard_writer = variables.get_wandb_writer = lambda: None
    moved = [Moved(2, 4, 0.5, 100), Moved(3, 2, None, 50)]
    monkeypatch.setattr(pretrain, "_over_ranks", lambda *_: (moved, 1.5, 2.5))
    monkeypatch.setattr(pretrain.dist, "get_rank", lambda: 0)
    return variables


def test_every_update_goes_to_weights_and_biases_in_one_piece(writers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    writers.get_wandb_writer = lambda: SimpleNamespace(log=lambda scalars, step: logged.append((scalars, step)))
    times = IterationTimes()
    for iteration, ms in enumerate((100.0, 10.0, 7.0), start=1):
        times.add(ms)
        REPORT(None, [], iteration, times)
    common = {"moved_experts": 6, "sent_bytes": 150, "planning_ms": 1.5, "migration_ms": 2.5, "modelled_gain_ms": 0.5}
    expected = {f"hiermoe/{name}": value for name, value in common.items()}
    assert logged == [(expected, 1), (expected, 2), (expected | {"hiermoe/realised_gain_ms": 3.0}, 3)]
    said = capsys.readouterr().out.splitlines()
    assert "4 in layer 2, 2 in layer 3 | modelled gain 0.500 ms a step | planning 1.5 ms" in said[1]
    assert "modelled gain 0.500 ms a step | realised by the update before: 3.000 ms | planning 1.5 ms" in said[2]


def test_weights_and_biases_takes_it_as_megatron_gives_it(writers: Any, tmp_path: Path) -> None:
    import wandb

    run = wandb.init(mode="disabled", dir=tmp_path)
    writers.get_wandb_writer = lambda: wandb  # the module, as Megatron has it
    REPORT(None, [], 7, IterationTimes())
    run.finish()
