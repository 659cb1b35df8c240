"""What somebody adds changes the name of no other run: baselines/README.md, followed to the letter in a copied tree."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hiermoe.records.project import CODE
from hiermoe.runs.compose import swept

# As the README says: a function (hierarchy, **options) and a class with measure, decide and its state, in one file.
MINE = '''"""Mine: whole rows, two stages; experts stay where they are."""

from hiermoe.planner.scheme import DispatchScheme, hierarchical
from hiermoe.policies.protocol import StaticPolicy
from hiermoe.topology.hierarchy import Hierarchy


def two_stages(hierarchy: Hierarchy, deduplicate: bool = True) -> tuple[DispatchScheme, ...]:
    """HD2 by another name."""
    return (hierarchical(2, deduplicate, hierarchy),)


class MyPolicy(StaticPolicy):
    """Stays."""
'''
MINE_YAML = """name: mine
label: Mine
color: "#117733"
entrant: true
schemes: {_target_: baselines.mine.two_stages, deduplicate: true}
policy: {_target_: baselines.mine.MyPolicy}
"""
ALL_RUNS = """
import json
from hiermoe.records.store import RunStore
from hiermoe.runs.compose import expand, large_sweep_names, sweep_names
from hiermoe.runs.measured_cells import AMOUNTS, measured_cells
from hiermoe.runs.training import expand_training
runs = {name: expand(name) for name in (*sweep_names(), *large_sweep_names())}
for amount in AMOUNTS:
    runs[amount] = [cell for one in measured_cells(amount) for cell in (one.measured, one.predicted)]
runs |= {name: expand_training(name) for name in ("losses", "end_to_end")}
print(json.dumps({name: [cell.config.run_id for cell in cells] for name, cells in runs.items()}))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of everything that says what runs there are, with calibrated clusters."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in ("hiermoe", "baselines", "conf", "sweeps"):
        shutil.copytree(CODE / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    traces = tree / "results" / "traces"
    traces.mkdir(parents=True)
    for path in (CODE / "results" / "traces").glob("*.trace"):
        (traces / path.name).symlink_to(path)
    (tree / "results" / "clusters").mkdir()
    for name in ("emulated_4x2", "emulated_4x8"):
        text = (
            (tree / "conf" / "cluster" / f"{name}.yaml")
            .read_text()
            .replace(f"name: {name}", f"name: {name}_calibrated")
        )
        (tree / "results" / "clusters" / f"{name}_calibrated.yaml").write_text(text)
    for path in (tree / "sweeps" / "train").glob("end_to_end*.yaml"):  # where recordings would have left a model
        if "resume" in (params := swept(path)):
            (tree / params["resume"]).mkdir(parents=True)
    return tree


def run_ids(tree: Path) -> dict[str, list[str]]:
    """Of all runs of all sweeps, as the code and the files of a tree have them."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", ALL_RUNS]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_an_added_system_and_files_that_no_run_uses_change_no_other_run(tree: Path) -> None:
    before = run_ids(tree)
    assert sum(map(len, before.values())) > 600
    (tree / "baselines" / "mine.py").write_text(MINE)
    (tree / "conf" / "system" / "mine.yaml").write_text(MINE_YAML)
    (tree / "baselines" / "unused.py").write_text("VALUE = 1\n")
    (tree / "hiermoe" / "policies" / "unused_by_all.py").write_text("VALUE = 1\n")
    page = tree / "hiermoe" / "advice" / "page.py"
    page.write_text(page.read_text() + "\n\nUNUSED = 1\n")
    after = run_ids(tree)
    joined = 0
    for name, ids in before.items():
        others = [run_id for run_id in after[name] if not run_id.startswith("mine-")]
        assert others == ids, name
        joined += len(after[name]) - len(ids)
    assert joined > 50
    (tree / "baselines" / "mine.py").write_text(MINE.replace("hierarchical(2", "hierarchical(1"))
    again = run_ids(tree)
    for name, ids in after.items():
        assert [now == then for now, then in zip(again[name], ids, strict=True)] == [
            not run_id.startswith("mine-") for run_id in ids
        ], name
