"""What `place_experts` wraps in Megatron's training loop, and what it refuses; the loop here is a stand-in."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hiermoe.megatron.standins import cpu

cpu.expect_fallbacks()

from hiermoe.megatron import pretrain  # noqa: E402
from hiermoe.megatron.pretrain import place_experts  # noqa: E402
from hiermoe.topology.placement import Placement  # noqa: E402

CALLED = ("hiermoe", "a6000_4x8")


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
