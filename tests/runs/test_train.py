"""`hiermoe train` leaves a row a step and rank, whatever happens to the ranks."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from hiermoe.measure.train import turns
from hiermoe.records.store import RunStore
from hiermoe.runs.compose import compose
from hiermoe.runs.training import TrainRunConfig
from tests.conftest import Command

TINY = [
    "model.vocab_size=512",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=32",
    "model.moe_ffn_hidden_size=16",
    "model.num_experts=16",
    "model.topk=2",
    "seq_length=16",
    "sequences_per_step=8",
    "corpus_files=24",
    "cluster=a6000_4x8",
    "world_size=4",
    "wandb.mode=disabled",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run of a second."""
    return [*TINY, f"cache_dir={tmp_path_factory.mktemp('corpus')}"]


def configured(*overrides: str) -> TrainRunConfig:
    """The checked configuration."""
    return compose("train", overrides, TrainRunConfig)


def test_a_run_leaves_a_row_of_every_step_and_rank_and_is_not_repeated(
    hiermoe: Command, store: RunStore, tiny: list[str]
) -> None:
    command = ["train", "system=hd_moe", "steps=3", *tiny]
    code, out, _ = hiermoe(*command)
    assert code == 0 and "HD-MoE" in out and "in 3 steps" in out
    (folder,) = store.folder.iterdir()
    records = store.read(folder.name)
    assert list(zip(records["rank"], records["iteration"], strict=True)) == [(r, s) for r in range(4) for s in range(3)]
    assert set(records["phase"]) == {"train"} and set(records["source"]) == {"local"}
    assert (records["cluster"] == "a6000_4x8@4").all() and (records["num_ranks"] == 4).all()
    assert (records["tokens_per_rank"] == 8 // 4 * 16).all()
    assert records.groupby("iteration")["loss"].nunique().tolist() == [1, 1, 1]
    assert records["loss"].nunique() == 3
    assert records["counted"].tolist() == [False, False, True] * 4
    alltoall = records["alltoall_forward_ms"] + records["alltoall_backward_ms"]
    assert (records["wire_ms"] > 0).all() and (records["local_ms"] > 0).all()
    assert (records["wire_ms"] < alltoall).all() and (alltoall < records["train_step_ms"]).all()
    written = (folder / "records.parquet").stat().st_mtime_ns
    code, out, _ = hiermoe(*command)
    assert code == 0 and "kept from before" in out
    assert (folder / "records.parquet").stat().st_mtime_ns == written


@pytest.mark.slow
def test_replicas_share_the_ranks_and_cut_the_cluster(hiermoe: Command, store: RunStore, tiny: list[str]) -> None:
    code, _, _ = hiermoe("train", *tiny, "system=hd2", "steps=2", "data_parallel=2", "world_size=8", "recompute=true")
    assert code == 0
    (folder,) = store.folder.iterdir()
    records = store.read(folder.name)
    assert set(records["rank"]) == set(range(8))
    assert (records["cluster"] == "a6000_4x8@4").all() and (records["num_ranks"] == 8).all()


def test_a_turn_lasts_until_experts_on_their_way_have_arrived() -> None:
    moving, still = (SimpleNamespace(next_step=0, moves_travel=False) for _ in range(2))
    order = []
    for step in range(4):
        for of in turns([moving, still], step, 4):
            order.append("MS"[of])
            one = (moving, still)[of]
            moving.moves_travel = one is moving and one.next_step in (0, 3)
            one.next_step += 1
    assert "".join(order) == "MMSSMSSM"
    assert (moving.next_step, still.next_step) == (4, 4)


def test_systems_of_one_command_take_turns_and_learn_what_each_learns_alone(
    hiermoe: Command, store: RunStore, tiny: list[str]
) -> None:
    """Experts of one travel in the background."""
    hidden = "+system.migration=background"  # of the system that moves experts; the other has none to move
    command = ["train", "-m", *tiny, "steps=5", "dtype=fp64", hidden]
    code, out, err = hiermoe(*command, "system=megatron,hiermoe")
    assert code == 0, err
    assert out.count("in 5 steps") == 2
    together = {folder.name: store.read(folder.name) for folder in store.folder.iterdir()}
    assert len(together) == 2
    moved = next(rows for name, rows in together.items() if name.startswith("hiermoe"))
    assert moved["moved_experts"].sum() > 0 and moved["hidden_ms"].gt(0).any()
    for rows in together.values():
        assert sorted(rows.loc[rows["rank"] == 0, "iteration"]) == [0, 1, 2, 3, 4]
    for folder in list(store.folder.iterdir()):
        shutil.rmtree(folder)
    for system in ("megatron", "hiermoe"):
        code, _, err = hiermoe("train", *tiny, "steps=5", "dtype=fp64", hidden, f"system={system}")
        assert code == 0, err
    for name, rows in together.items():
        alone = store.read(name).sort_values(["rank", "iteration"])
        rows = rows.sort_values(["rank", "iteration"])
        assert rows["loss"].tolist() == alone["loss"].tolist()
        assert rows["moves"].tolist() == alone["moves"].tolist()


def test_experts_that_move_are_on_record(hiermoe: Command, store: RunStore, tiny: list[str]) -> None:
    code, _, _ = hiermoe("train", "system=hiermoe", "steps=4", *tiny)
    assert code == 0
    records = store.read(next(store.folder.iterdir()).name)
    assert records["moved_experts"].sum() > 0
    assert records.loc[records["moved_experts"] > 0, "migration_ms"].gt(0).all()
    assert records.groupby("iteration")["migration_bytes"].sum().gt(0).any()


def test_a_rank_killed_in_training_is_named_and_finished_steps_are_kept(
    hiermoe: Command, store: RunStore, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hiermoe.ranks.streams.SCRATCH", tmp_path)
    killer = threading.Thread(target=kill_a_rank_after_step, args=(tmp_path, 2, 3), daemon=True)
    killer.start()
    code, _, err = hiermoe("train", "system=hd2", "steps=2000", *tiny)
    assert code == 2
    assert err.strip() == "error: rank 2 of 4 died by signal SIGKILL"
    (folder,) = store.folder.iterdir()
    records = store.read(folder.name)
    assert set(records["status"]) == {"failed"} and set(records["reason"]) == {"rank 2 of 4 died by signal SIGKILL"}
    steps = records["iteration"].max() + 1
    assert 3 <= steps < 2000
    assert records.groupby("rank").size().tolist() == [steps] * 4
    assert records["loss"].notna().all()
    assert not store.is_done(folder.name)


def kill_a_rank_after_step(folder: Path, rank: int, steps: int) -> None:
    """Wait until all ranks have streamed so many steps, then kill one; ranks are started in their order."""
    while True:
        streams = list(folder.glob("*/rank-*.jsonl"))
        if len(streams) == 4 and all(len(x.read_text().splitlines()) >= steps for x in streams):
            break
        time.sleep(0.05)
    processes = psutil.Process().children(recursive=True)
    ranks = sorted(x.pid for x in processes if "forkserver" in " ".join(x.cmdline()) and x.ppid() != os.getpid())
    os.kill(ranks[rank], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("system", "reason"),
    [
        ("h4", "dimension=4 is outside 1..2"),
        ("megatron_flex", "flex dispatcher needs a GPU"),
        ("eplb", "in more than one place"),
    ],
)
def test_a_system_without_meaning_here_keeps_a_row_with_its_reason(
    system: str, reason: str, hiermoe: Command, store: RunStore, tiny: list[str]
) -> None:
    code, _, err = hiermoe("train", f"system={system}", *tiny)
    assert code == 2 and reason in err
    (folder,) = store.folder.iterdir()
    (row,) = store.read(folder.name).to_dict("records")
    assert row["status"] == "not_applicable" and reason in row["reason"]
    code, out, _ = hiermoe("train", "-m", f"system={system}", *tiny)
    assert code == 0 and "not applicable" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data_parallel=3"], "world_size=4 does not split into data_parallel=3 replicas"),
        (["world_size=0"], "world_size=0 does not split"),
        (["world_size=7"], "world_size=7: cluster a6000_4x8 has 32 GPUs"),
        (["sequences_per_step=7"], "sequences_per_step=7 is not divisible by world_size=4"),
        (["model.num_experts=18"], "num_experts=18 is not divisible by ep_size=4"),
        (["steps=1"], "steps=1: Input should be greater than or equal to 2"),
        (["dtype=fp8"], "dtype=fp8: Input should be"),
        (["system=nothing"], "hd2_moe_smart"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_training_that_does_not_fit_ends_in_one_line(
    overrides: list[str], message: str, hiermoe: Command, tiny: list[str]
) -> None:
    code, _, err = hiermoe("train", *tiny, *overrides)
    assert code != 0
    assert message in err
    assert "Traceback" not in err


def test_a_run_is_named_by_all_that_may_change_its_numbers(tiny: list[str], tmp_path: Path) -> None:
    reference = configured(*tiny).run_id
    for same in ("wandb.project=other", f"cache_dir={tmp_path}"):
        assert configured(*tiny, same).run_id == reference
    different: list[Any] = ["dtype=fp64", "recompute=true", "corpus_files=23", "world_size=8", "system=hd1", "seed=2"]
    different.append("corpus.kinds.Python.files.python=*.py")
    assert len({reference, *(configured(*tiny, change).run_id for change in different)}) == len(different) + 1
