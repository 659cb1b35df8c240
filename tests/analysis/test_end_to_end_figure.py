"""Whole training steps: their parts, and speed-ups over stock, from records of training."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hiermoe.analysis.claims import load_claims
from hiermoe.analysis.figures.measured.training_steps import FIGURE
from hiermoe.analysis.frames import load
from hiermoe.records.index import IndexedRun
from hiermoe.records.store import RunStore

STEPS = 8
ALLTOALL_MS = {"megatron": 60.0, "hiermoe": 20.0}


@dataclass(frozen=True)
class Named:
    """As much of a configuration as the figure asks for."""

    name: str
    label: str = ""
    source: str = "emulated"
    device: str = "cpu"
    num_layers: int = 2
    num_dense_layers: int = 1
    hidden_size: int = 64
    vocab_size: int = 8192


EMULATED = Named("emulated")
GPUS = Named("allocation", source="cluster", device="cuda")


@dataclass(frozen=True)
class Config:
    """Of a training run."""

    system: Named
    model: Named = Named("qwen3_30b_a3b_narrow")
    corpus: Named = Named("standard_library")
    cluster: Named = Named("emulated_4x8_calibrated")
    ranks: Named = EMULATED
    world_size: int = 2
    sequences_per_rank: int = 1
    seq_length: int = 32
    dtype: str = "fp32"
    begun: int = 408

    @property
    def run_id(self) -> str:
        """Of its record."""
        return f"{self.system.name}-run"


def entry(config: Config) -> IndexedRun:
    """In the index of runs."""
    keys = {"source": config.ranks.source, "system": config.system.name, "model": config.model.name}
    return IndexedRun(config.run_id, config, keys | {"routing": "trained", "num_ranks": config.world_size}, {})


def rows(system: str) -> pd.DataFrame:
    """Two ranks; the second is always the busiest, and the steps before the counted ones take ten times as long.

    The first one waits for it when both plan, and then moves for longer.
    """
    waits_ms = 40 + ALLTOALL_MS[system]
    keys = {
        "run_id": f"{system}-run", "source": "emulated", "system": system, "model": "qwen3_30b_a3b_narrow",
        "cluster": "emulated_4x8_calibrated", "routing": "trained", "seed": 1, "num_experts": 128, "topk": 8,
        "num_ranks": 2, "tokens_per_rank": 64, "layer": -1, "phase": "train", "stage": "all",
    }  # fmt: skip
    found: list[dict[str, Any]] = []
    for step in range(STEPS):
        for rank, factor in ((0, 0.5), (1, 1.0)):
            scale = factor * (1 if step >= STEPS // 2 else 10)
            found.append(
                keys | {
                    "iteration": step, "routing_iteration": step, "counted": step >= STEPS // 2, "rank": rank,
                    "loss": 9.0 - step, "train_step_ms": scale * (40 + ALLTOALL_MS[system]),
                    "alltoall_forward_ms": scale * ALLTOALL_MS[system] / 2,
                    "alltoall_backward_ms": scale * ALLTOALL_MS[system] / 2,
                    "planning_ms": 2.0 + (1 - factor) * waits_ms if system == "hiermoe" else 0.0,
                    "migration_ms": (8.0 if rank else 9.0) if system == "hiermoe" else 0.0,
                    "landing_ms": scale if system == "hiermoe" else 0.0,
                }
            )  # fmt: skip
    return pd.DataFrame(found)


@pytest.fixture(params=["emulated", "cluster"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> pd.DataFrame:
    store = RunStore(tmp_path / "runs")
    configs = [Config(Named("megatron", "Megatron-LM")), Config(Named("hiermoe", "HierMoE")), Config(Named("hd_moe"))]
    for config in configs[:2]:
        store.write(config.run_id, {}, {}, rows(config.system.name))
    ranks = EMULATED if request.param == "emulated" else GPUS
    index = [entry(replace(config, ranks=ranks)) for config in configs]
    return FIGURE.table(load({"end_to_end": index}, store), load_claims())


def test_a_step_is_what_the_busiest_rank_takes_with_all_that_follows_it(table: pd.DataFrame) -> None:
    stock, hiermoe = table.to_dict("records")
    assert (stock["step_ms"], hiermoe["step_ms"]) == (100.0, 71.0)
    assert (hiermoe["alltoall_ms"], hiermoe["compute_ms"]) == (20.0, 39.0)
    assert (hiermoe["planning_ms"], hiermoe["migration_ms"]) == (2.0, 10.0)  # 9 after the step, 1 within it
    assert (stock["alltoall_share"], stock["n"]) == (0.6, STEPS // 2)


def test_speedups_are_of_whole_steps_and_of_alltoall(table: pd.DataFrame) -> None:
    stock, hiermoe = table.to_dict("records")
    assert hiermoe["step_ms_speedup"] == pytest.approx(100 / 71)
    assert hiermoe["alltoall_ms_speedup"] == pytest.approx(3)
    assert hiermoe["expected"] == pytest.approx(100 / (40 + 60 / 3))  # planning and moves left out
    assert stock["expected"] == pytest.approx(1) and hiermoe["published"] == "1.18–1.27"


def test_drawing_and_words_come_from_the_table(table: pd.DataFrame) -> None:
    source = table["source"].iloc[0]
    words = FIGURE.words(table)
    assert "Qwen3-30B-A3B 1.41× with HierMoE" in words.title
    assert "2 layers, 1 of them dense, width 64, vocabulary 8192, 1 x 32 tokens a rank" in words.caption
    assert "of the corpus standard library, after 408 steps" in words.caption
    where = {"emulated": ("the emulated cluster", "2 gloo ranks"), "cluster": ("a cluster", "2 GPUs over NCCL")}
    assert where[source][0] in words.title and where[source][1] in words.caption
    header, *lines = words.rows
    assert len(lines) == 2 and {len(line) for line in lines} == {len(header)}
    assert FIGURE.draw(table, words.title).axes
