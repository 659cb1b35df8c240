"""A run's name changes with whatever code makes its numbers."""

import ast
from pathlib import Path

import pytest

from hiermoe.records.project import PROJECT_ROOT
from hiermoe.records.run_id import MEASURED_SOURCES, SIMULATED_SOURCES

SIMULATING = ("hiermoe.backends.simulated", "hiermoe.backends.bounds", "hiermoe.backends.synthetic_timings")
MEASURING = ("hiermoe.backends.replay", "hiermoe.backends.training", "hiermoe.backends.calibration")
# They say where files are and how a run ended, or write records down, and make no number.
NO_NUMBERS = {f"hiermoe/records/{name}.py" for name in ("project", "status", "store")}


def imported(path: Path) -> set[Path]:
    """Files of the project that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = (
        PROJECT_ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith(("hiermoe", "baselines"))
    )
    return {file for file in files if file.exists()}


def all_imported(modules: tuple[str, ...]) -> set[str]:
    """The files of modules and of all that they import, and so on."""
    found: set[Path] = set()
    left = {PROJECT_ROOT / f"{name.replace('.', '/')}.py" for name in modules}
    while left:
        file = left.pop()
        found.add(file)
        left |= imported(file) - found
    return {file.relative_to(PROJECT_ROOT).as_posix() for file in found}


@pytest.mark.parametrize(("modules", "patterns"), [(SIMULATING, SIMULATED_SOURCES), (MEASURING, MEASURED_SOURCES)])
def test_all_code_that_makes_numbers_counts(modules: tuple[str, ...], patterns: tuple[str, ...]) -> None:
    counted = {path.relative_to(PROJECT_ROOT).as_posix() for pattern in patterns for path in PROJECT_ROOT.glob(pattern)}
    used = all_imported(modules)
    assert len(used) > 10
    assert used - counted - NO_NUMBERS == set()
