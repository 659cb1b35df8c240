"""A training step's row: what policies measure in forward passes is planning, and not the step."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hiermoe.measure import one_training
from hiermoe.measure.one_training import OneTraining

STEP_S, MEASURING_MS = 0.2, 150.0


def test_a_step_is_timed_without_what_policies_measured_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Trainer:
        model = optimizer = None

        def __init__(self, *of: Any, **named: Any) -> None:
            pass

        def batch(self, corpus: Any, step: int) -> torch.Tensor:
            return torch.zeros(1)

        def step(self, sequences: torch.Tensor) -> float:
            time.sleep(STEP_S)
            return 1.0

    placement = SimpleNamespace(
        measuring_ms=MEASURING_MS, planning_ms=200.0, migration_ms=0.0, landing_ms=0.0, step=lambda optimizer: []
    )
    monkeypatch.setattr(one_training, "Trainer", Trainer)
    monkeypatch.setattr(one_training, "attach", lambda *of, **named: placement)
    monkeypatch.setattr(one_training.dist, "barrier", lambda: None)
    checkpoints = SimpleNamespace(start=None, begun=0, every=None, folder=Path(), keep=None)
    job: Any = SimpleNamespace(training=None, system=None, cluster=None, checkpoints=checkpoints, steps=4)
    meter: Any = SimpleNamespace(drain=list)
    started = time.perf_counter()
    row = OneTraining(job, meter, None, "cpu").step(None)  # type: ignore[arg-type]
    elapsed_ms = (time.perf_counter() - started) * 1e3
    assert STEP_S * 1e3 - MEASURING_MS <= row["train_step_ms"] <= elapsed_ms - MEASURING_MS
    assert row["planning_ms"] == 200.0
