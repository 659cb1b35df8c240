"""Compare two results stores: every value of every simulated run, exactly.

    python tests/compare_records.py OLD/results/runs NEW/results/runs

Runs find their partner by what their configuration means, whatever they are called: names of measurements are
translated by the tables below, what only a reader sees is left out, arguments that a file leaves to a signature are
filled in. Of a store that has several runs of one meaning (made by several versions of the code) each is compared. Exit
status 1 if a value differs, if a run has no partner, or if there is nothing to compare.
"""

import ast
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

PROJECT = Path(__file__).parent.parent

# What an old store says -> what a new one says.
COLUMNS = {"measured": "counted"}
MEASURES = {"simulated": "predict", "bounds": "bound", "synthetic_timings": "self_test", "planning": "plan_cost"}
# A measurement that needs no tokens: what the old configuration named all the same says nothing, in columns either.
NEEDS_CLUSTER_ALONE = {"self_test"}
UNSAID = {"system": "none", "model": "none", "routing": "none"}
UNSAID |= {"num_experts": 0, "topk": 0, "tokens_per_rank": 0, "row_bytes": 0}

# Keys of the new house, with what they are where the old one had none.
ADDED = {"across": False, "choice_bytes": 0, "copy_choice": "source"}
DISPLAYED = {"label", "color", "entrant", "description", "placement_label", "placement_color"}
TRAINED = {"migration"}  # of training alone: no simulated value depends on it
KEYS = {"seed", "tokens_per_rank"}  # options that columns of all records have always had
WHERE = {"backend", "measure", "ranks"}  # read by _measure


@dataclass
class Comparison:
    """What came out.

    Attributes:
        compared: pairs of runs whose values were compared.
        num_values: compared.
        left_out: why -> runs that were not asked for.
        without_partner: names of runs, with their store.
        differences: one line each.
    """

    compared: int = 0
    num_values: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    without_partner: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether something was compared, and nothing differs."""
        return self.compared > 0 and not self.differences and not self.without_partner


def compare(old: Path, new: Path) -> Comparison:
    """Compare the simulated runs of two stores.

    Args:
        old: folder of runs, ``<run_id>/{config.yaml, records.parquet}``.
        new: likewise.
    """
    found = Comparison()
    old_runs, new_runs = (_by_meaning(folder, found.left_out) for folder in (old, new))
    for meaning in sorted(old_runs.keys() | new_runs.keys()):
        olds, news = old_runs.get(meaning, []), new_runs.get(meaning, [])
        found.without_partner += [f"old {run.name}" for run in olds if not news]
        found.without_partner += [f"new {run.name}" for run in news if not olds]
        for before, after in ((before, after) for before in olds for after in news):
            found.compared += 1
            found.num_values += _compare_run(before, after, json.loads(meaning)["measure"], found.differences)
    return found


def _by_meaning(folder: Path, left_out: Counter[str]) -> dict[str, list[Path]]:
    """Folders of the simulated runs of a store, under what their configuration means."""
    runs: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*/records.parquet")):
        source = str(pd.read_parquet(path, columns=["source"])["source"].iloc[0])
        if source == "simulated":
            config = yaml.safe_load((path.parent / "config.yaml").read_bytes())
            runs.setdefault(meaning(config), []).append(path.parent)
        else:
            left_out[f"measured ({source})"] += 1
    return runs


def meaning(config: dict[str, Any]) -> str:
    """What a configuration asks for, as JSON text in which equal meanings are equal."""
    measure = _measure(config)
    content = {key: value for key, value in config.items() if key not in WHERE}
    if measure in NEEDS_CLUSTER_ALONE:
        content = {key: content[key] for key in ("cluster", "seed")}
    return json.dumps({"measure": measure, **_meant(content)}, sort_keys=True)


def _measure(config: dict[str, Any]) -> str:
    """What is measured, in the words of the new house."""
    named = config["measure"] if "measure" in config else config["backend"]
    name = str(named["name"] if isinstance(named, dict) else named)
    return MEASURES.get(name, name)


def _meant(value: Any) -> Any:
    """A part of a configuration without what only a reader sees and what says nothing, and with defaults filled in."""
    if isinstance(value, dict):
        if "_target_" in value:
            target = str(value["_target_"]).rpartition(".")[2]
            value = {**_defaults(target), **value, "_target_": target}
        kept = {key: _meant(item) for key, item in value.items() if key not in DISPLAYED | TRAINED}
        said = {key: item for key, item in kept.items() if (key, item) not in ADDED.items()}
        return {key: item for key, item in said.items() if item not in (None, {}, [])}
    return [_meant(item) for item in value] if isinstance(value, list) else value


@lru_cache
def _defaults(name: str) -> dict[str, Any]:
    """Arguments that a function or class of the project need not be given, with their values."""
    for path in [*PROJECT.glob("hiermoe/**/*.py"), *PROJECT.glob("baselines/*.py")]:
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return dict(_of_signature(node.args))
            if isinstance(node, ast.ClassDef) and node.name == name:
                methods = (item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
                return dict(_of_fields(node)) | {key: v for method in methods for key, v in _of_signature(method.args)}
    return {}


def _of_signature(arguments: ast.arguments) -> Iterator[tuple[str, Any]]:
    positional = [*arguments.posonlyargs, *arguments.args]
    given = [*zip(positional[len(positional) - len(arguments.defaults) :], arguments.defaults, strict=True)]
    given += [(arg, value) for arg, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value]
    yield from ((arg.arg, ast.literal_eval(value)) for arg, value in given)


def _of_fields(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for item in node.body:
        if (
            isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and isinstance(item.value, ast.Constant)
        ):
            yield item.target.id, item.value.value


def _compare_run(old: Path, new: Path, measure: str, differences: list[str]) -> int:
    """Compare the records of two runs.

    Returns:
        How many values were compared.
    """
    before, after = (pd.read_parquet(run / "records.parquet").drop(columns="run_id") for run in (old, new))
    before, after = before.rename(columns=COLUMNS), after.rename(columns=COLUMNS)
    if measure in NEEDS_CLUSTER_ALONE:
        before = before.assign(**{column: value for column, value in UNSAID.items() if column in before})
    before, after = _measurements(before, old), _measurements(after, new)
    where = f"{old.name} and {new.name}"
    differences += [
        f"{where}: column {column} stands only in the {'old' if column in before else 'new'} store"
        for column in sorted(set(before.columns) ^ set(after.columns))
    ]
    if len(before) != len(after):
        differences.append(f"{where}: {len(before)} rows, {len(after)} rows")
        return 0
    shared = [column for column in before.columns if column in after.columns]
    for column in shared:
        was, now = before[column].to_numpy(), after[column].to_numpy()
        rows = np.flatnonzero(~((was == now) | (pd.isna(was) & pd.isna(now))))
        if len(rows):
            pairs = ", ".join(f"row {row}: {_shown(was[row])} -> {_shown(now[row])}" for row in rows[:3])
            differences.append(f"{where}: {column}, {len(rows)} of {len(was)} rows: {pairs}")
    return len(before) * len(shared)


def _measurements(rows: pd.DataFrame, run: Path) -> pd.DataFrame:
    """Rows without the columns of options, which are compared by what they mean."""
    config = yaml.safe_load((run / "config.yaml").read_bytes())
    named = {"measure", *(key for key, value in config.items() if not isinstance(value, dict))} - KEYS
    return rows.drop(columns=[name for name in rows if "." in str(name) or name in named])


def _shown(value: Any) -> str:
    """All digits of a number."""
    return repr(value.item() if isinstance(value, np.generic) else value)


def main(arguments: list[str]) -> int:
    """Compare, print what came out, and return the exit status."""
    if len(arguments) != 2:
        print(__doc__)
        return 2
    found = compare(*(Path(argument) for argument in arguments))
    for line in [*found.differences, *(f"{run}: no partner" for run in found.without_partner)]:
        print(line)
    for why, number in found.left_out.items():
        print(f"left out: {number} runs, {why}")
    print(f"{found.compared} pairs of runs compared, {found.num_values} values: {len(found.differences)} differences")
    print(f"without a partner: {len(found.without_partner)}")
    return 0 if found.equal else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
