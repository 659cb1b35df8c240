"""Cells of the real sweeps without Hydra, and small made-up records for them."""

import itertools
import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from omegaconf import OmegaConf

from hiermoe.analysis.frames import Results, load
from hiermoe.records.project import CONF, SWEEPS
from hiermoe.records.schema import DEFAULTS, RECORDS, validate
from hiermoe.records.status import Status
from hiermoe.records.store import RunStore
from hiermoe.routing.step import first_measured
from hiermoe.runs.compose import Cell, sweep_names
from hiermoe.runs.indexing import indexed
from hiermoe.runs.run_config import RunConfig

GROUPS = ("system", "model", "cluster", "routing")
ITERATIONS = 8
SIZES = ("world_size", "max_ep_size", "tokens_per_rank")
THINNED: dict[str, dict[str, tuple[Any, ...]]] = {  # of sweeps beyond the paper, as much as tests need
    "scaling": {"world_size": (8, 64, 256)},
    "heat_map": {"cluster": ("h100_ib400", "h800_ib400"), "model": ("deepseek_v3", "mixtral_8x22b")},
    "planner_cost": {"model.num_experts": (64, 256), "world_size": (8, 64)},
}
# Milliseconds of a step, made up: the order is the paper's.
STEP_MS = {
    "megatron": 80.0, "smartmoe": 79.0, "tutel": 94.0, "hd2_moe_smart": 66.0, "hd2": 63.0, "hd_moe": 46.0, "hd": 50.0,
    "hiermoe": 40.0, "h1": 80.0, "h": 95.0,
}  # fmt: skip
COPIES_MS = 3.0  # made up: what copies send in a step


@lru_cache
def load_yaml(file: str) -> str:
    """One file of conf/, as JSON: quick to copy."""
    return json.dumps(yaml.safe_load((CONF / f"{file}.yaml").read_text()))


def cell(overrides: dict[str, Any]) -> Cell:
    """What ``expand`` makes of one combination, for the keys that the sweeps use."""
    base = json.loads(load_yaml("config"))
    names = {key: value for entry in base["defaults"] if isinstance(entry, dict) for key, value in entry.items()}
    values = dict(overrides)
    varied, size = str(values.get("+experiment", "")).removeprefix("table4_")[:1], values.get("+experiment", "")[8:]
    if varied == "g":
        values["cluster"] = f"a6000_{int(size) // 8}x8"
    elif varied:
        values["model.topk" if varied == "k" else "model.num_experts"] = int(size)
    measured = json.loads(load_yaml(f"measure/{values.get('measure', names['measure'])}"))
    without = {key.removeprefix("override /") for entry in measured.get("defaults", ()) for key in entry}
    content: dict[str, Any] = {
        group: json.loads(load_yaml(f"{group}/{values.get(group, names[group])}"))
        for group in GROUPS
        if group not in without
    } | {"measure": measured["measure"]}
    for key, value in values.items():
        if "." in key:
            *path, last = key.split(".")
            target = content
            for part in path:
                target = target[part]
            target[last] = value
    wandb = {"mode": "disabled", "project": "test"}
    sizes = {"tokens_per_rank": 64} | {key: values[key] for key in SIZES if key in values}
    config = RunConfig(**content, **sizes, iterations=ITERATIONS, seed=0, wandb=wandb)  # type: ignore[arg-type]
    return Cell(tuple(f"{key}={value}" for key, value in overrides.items()), config)


@pytest.fixture(scope="session")
def cells() -> dict[str, list[Cell]]:
    """All sweeps, cell by cell as they are expanded."""
    expanded = {}
    for name in sweep_names():
        params = OmegaConf.load(SWEEPS / f"{name}.yaml").hydra.sweeper.params
        choices = [[(key, yaml.safe_load(x)) for x in str(values).split(",")] for key, values in params.items()]
        for key, kept in THINNED.get(name, {}).items():
            (varied,) = [choice for choice in choices if choice[0][0] == key]
            varied[:] = [(key, value) for key, value in varied if value in kept]
            assert len(varied) == len(kept)
        expanded[name] = [cell(dict(combination)) for combination in itertools.product(*choices)]
    return expanded


def step_ms(system: str) -> float:
    """Made-up time of a system's step."""
    return STEP_MS[max((name for name in STEP_MS if system.startswith(name)), key=len, default="megatron")]


def records_of(config: RunConfig) -> pd.DataFrame:
    """Rows as measurements write them, with made-up numbers that differ between iterations."""
    if config.measure == "self_test":
        return _timings(config)
    if config.measure == "plan_cost":
        return _planning()
    hierarchy = config.cluster.hierarchy
    noise = np.random.default_rng(1)
    measured_from = first_measured(ITERATIONS, None)
    dimension = 2 if hierarchy.depth > 1 and config.system.name != "megatron" else 1
    name = config.system.name
    moves = 4 if name == "hiermoe_multi" else 2 if name.startswith("hiermoe") or "smart" in name else 0
    rows: list[dict[str, Any]] = []
    for iteration in range(ITERATIONS):
        keys = {
            "iteration": iteration, "routing_iteration": iteration, "counted": iteration >= measured_from, "layer": 0,
        }  # fmt: skip
        time_ms = step_ms(config.system.name) * (1 + 0.01 * noise.standard_normal())
        if config.measure == "bound":
            time_ms *= 0.5
        pairs = hierarchy.num_ranks * config.tokens_per_rank * config.model.topk
        stages = ("world",) if dimension == 1 else ("inter1", "intra1")
        rows += [
            keys | {
                "phase": "dispatch", "stage": f"{index + 1}:{stage}", "dimension": dimension, "rows": 500.0,
                "group_rows": 490.0, "predicted_ms": time_ms / 4 / len(stages), "bytes": 1e6, "crossing_rows": 4e3,
                "chunks": 1,
            }
            for index, stage in enumerate(stages)
        ]  # fmt: skip
        rows += [
            keys | {
                "phase": "routing", "stage": name, "dimension": level, "pairs": pairs,
                "rows": hierarchy.num_ranks * config.tokens_per_rank * min(groups, config.model.topk) * 0.9,
            }
            for level, (name, groups) in enumerate(zip(hierarchy.names, hierarchy.groups, strict=True), start=1)
        ]  # fmt: skip
        rows.append(
            keys | {
                "phase": "step", "stage": "all", "dimension": dimension, "predicted_ms": time_ms, "pairs": pairs,
                "dropped_pairs": 5.0 if "cf1" in config.system.name else 0.0, "expert_rows_max": 600.0,
                "expert_rows_mean": 512.0, "moved_experts": moves, "migration_bytes": moves * 6.6e7,
                "migration_link_ms": moves * 1.3, "migration_alltoall_ms": moves * 17.0,
                "modelled_gain_ms": 0.2 if name.startswith("hiermoe") else math.nan,
                "realised_gain_ms": 0.15 if moves and iteration < ITERATIONS - 1 else math.nan,
                "recounted_gain_ms": 0.25 if name == "hiermoe_multi" else math.nan,
                "net_ms": time_ms + (COPIES_MS if config.system.makes_copies else 0.0),
                "slots_gb": 0.5 if config.system.makes_copies else 0.0,
                "gradient_bytes": 1e9 if config.system.makes_copies else 0.0,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _planning() -> pd.DataFrame:
    keys = {"phase": "planning", "routing_iteration": 0, "layer": 0, "planning_ms": 3.0}
    return pd.DataFrame(
        [
            keys | {"iteration": i, "counted": i > 0, "stage": stage, "bytes": 1e6 if stage == "measure" else math.nan}
            for i in range(ITERATIONS)
            for stage in ("measure", "decide")
        ]
    )


def _timings(config: RunConfig) -> pd.DataFrame:
    from hiermoe.measure.self_test import synthetic_timings

    return synthetic_timings(config.cluster, config.seed)


class MemoryStore(RunStore):
    """Records of runs, never written to disk; of each kind the first is checked as all are that are written."""

    def __init__(self, folder: Path) -> None:
        """An empty store; nothing is in the folder."""
        super().__init__(folder)
        self.records: dict[str, pd.DataFrame] = {}
        self.provenances: dict[str, dict[str, Any]] = {}
        self.kinds: set[tuple[str, ...]] = set()

    def write(
        self, run_id: str, config: dict[str, Any], provenance: dict[str, Any], records: pd.DataFrame
    ) -> pd.DataFrame:
        """Keep a run, with all columns."""
        kind = (str(config["measure"]), *records.columns)
        if kind not in self.kinds:
            validate(records)
            self.kinds.add(kind)
        missing = {name: DEFAULTS.get(name, math.nan) for name in RECORDS.columns if name not in records}
        self.records[run_id] = records.assign(**missing)[list(RECORDS.columns)]
        self.provenances[run_id] = provenance
        return self.records[run_id]

    def ended(self, run_id: str) -> tuple[Status, str] | None:
        """Of a run that was kept."""
        if run_id not in self.records:
            return None
        first = self.records[run_id].iloc[0]
        return first["status"], first["reason"]

    def has(self, run_id: str) -> bool:
        """Whether it was kept."""
        return run_id in self.records

    def written(self, run_id: str) -> list[tuple[int, int]] | None:
        """Other numbers for whatever was kept."""
        return [(id(self.records[run_id]), 0)] if run_id in self.records else None

    def read(self, run_id: str) -> pd.DataFrame:
        """As it was kept."""
        return self.records[run_id]

    def provenance(self, run_id: str) -> dict[str, Any]:
        """As it was kept."""
        return self.provenances[run_id]


def write(store: RunStore, config: RunConfig, rows: pd.DataFrame, status: str = "ok", reason: str = "") -> None:
    """Store made-up records of a run, through the schema."""
    keys = {"run_id": config.run_id, **config.keys, "status": status, "reason": reason}
    provenance = {
        "commit": "0" * 40, "uncommitted_changes": False, "versions": {"python": "3"}, "platform": "test",
        "seconds": 1.0,
    }  # fmt: skip
    store.write(config.run_id, config.content, provenance, rows.assign(**keys))


def not_run() -> pd.DataFrame:
    """The one row of a run without measurements."""
    return pd.DataFrame(
        [{"iteration": -1, "routing_iteration": -1, "counted": False, "layer": -1, "phase": "run", "stage": "all"}]
    )


@pytest.fixture(scope="session")
def filled(cells: dict[str, list[Cell]], tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """Records for everything but recorded routing of DeepSeek-V3 (not applicable) and of other E (missing)."""
    store = MemoryStore(tmp_path_factory.mktemp("filled"))
    unique = {one.config.run_id: one.config for sweep in cells.values() for one in sweep}
    for config in unique.values():
        if config.system is None:
            write(store, config, records_of(config))
            continue
        recorded = config.routing.name == "recorded"
        if recorded and config.model.name == "deepseek_v3_paper":
            write(store, config, not_run(), "not_applicable", "no trace was recorded")
        elif config.routing.name == "group_limited" and config.model.router.num_groups is None:
            write(store, config, not_run(), "not_applicable", "the model's router has no group limit")
        elif config.system.name in ("h4", "hd4") and config.cluster.hierarchy.depth < 4:
            write(store, config, not_run(), "not_applicable", "dimension=4 is outside 1..3")
        elif not (recorded and config.model.num_experts != 128):
            write(store, config, records_of(config))
    return store


@pytest.fixture(scope="session")
def results(cells: dict[str, list[Cell]], filled: RunStore) -> Results:
    """Everything, loaded."""
    return load(indexed(cells), filled)


@pytest.fixture
def small_store(tmp_path: Path) -> Iterator[RunStore]:
    """An empty store."""
    yield MemoryStore(tmp_path / "runs")
