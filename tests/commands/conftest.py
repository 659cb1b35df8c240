"""What tests of commands share with those of what the commands do."""

from pathlib import Path

import pytest

from tests.advice.conftest import trace_file as trace_file


@pytest.fixture
def clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `hiermoe calibrate` writes clusters that nothing of ours has measured."""
    folder = tmp_path / "clusters"
    for module in ("runs.calibration_files", "runs.topology_files", "records.groups", "records.project"):
        monkeypatch.setattr(f"hiermoe.{module}.CLUSTERS", folder)
    return folder
