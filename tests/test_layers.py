"""The house: each folder imports only from those above it."""

import ast
from pathlib import Path

import pytest

from hiermoe.records.project import PROJECT_ROOT

ORDER = ["records", "routing", "model", "topology", "planner", "policies", "dispatch", "ranks", "megatron", "narrow"]
ORDER += ["measure", "runs", "analysis", "advice", "commands"]
FILES = sorted((PROJECT_ROOT / "hiermoe").rglob("*.py")) + sorted((PROJECT_ROOT / "baselines").rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PROJECT_ROOT).as_posix())
def test_module_imports_only_from_folders_above_its_own(path: Path) -> None:
    parts = path.relative_to(PROJECT_ROOT).parts
    if parts[0] == "baselines":
        allowed = set(ORDER[:6])
    elif len(parts) == 2:  # hiermoe/cli.py and its like put everything together
        allowed = set(ORDER)
    else:
        allowed = set(ORDER[: ORDER.index(parts[1]) + 1])
    for name in imported_modules(path):
        if name.startswith("hiermoe.") and name.split(".")[1] in ORDER:
            assert name.split(".")[1] in allowed, f"{name} stands below {parts[1]}"
        assert parts[0] == "baselines" or not name.startswith("baselines"), "hiermoe/ never imports baselines/"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PROJECT_ROOT).as_posix())
def test_module_is_small_and_named_for_what_it_does(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in ("utils", "helpers", "common")
