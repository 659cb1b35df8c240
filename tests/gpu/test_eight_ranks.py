"""Eight NCCL ranks, on however few GPUs there are: what they exchange is exact, experts move, models train, ranks die.

Ranks that share a GPU take turns on it, so nothing here says how fast anything is.
"""

import os
import signal
import time
from datetime import timedelta

import pandas as pd
import pytest
import torch
import torch.distributed as dist

from hiermoe.policies.system import SystemConfig
from hiermoe.ranks.launch import run_ranks
from hiermoe.ranks.server import RankFailedError
from hiermoe.records.groups import files_of
from hiermoe.records.store import RunStore
from hiermoe.runs.execute import execute_together
from tests.conftest import Command, Composer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
NUM_RANKS = 8
ELSEWHERE = ("h4", "hd4", "megatron_flex")  # a deeper cluster; DeepEP
LOSSY = ("tutel_2dh_padded_cf1",)
TRAINED = ("megatron", "tutel_2dh", "hd_moe", "smartmoe_f1", "hiermoe")
STEPS = 6
ON_GPUS = ("ranks=local", "ranks.device=cuda", f"world_size={NUM_RANKS}", "+cluster.overlap=1.0")


@pytest.mark.parametrize("routing", ["recorded", "stress_hot_spread"])
def test_every_element_is_right_under_every_system(composed: Composer, store: RunStore, routing: str) -> None:
    sizes = ("measure=replay", "tokens_per_rank=512", "iterations=2", f"routing={routing}", *ON_GPUS)
    systems = [name for name in files_of("system") if name not in ELSEWHERE]
    systems = [name for name in systems if not SystemConfig.named(name).makes_copies]
    configs = [composed(*sizes, f"system={name}") for name in systems]
    outcomes = execute_together(configs, store)
    assert [outcome.status for outcome in outcomes] == ["ok"] * len(systems), outcomes
    moved = {}
    for name, outcome in zip(systems, outcomes, strict=True):
        records = store.read(outcome.run_id)
        steps = records[records["phase"] == "step"]
        assert len(steps) == NUM_RANKS * 2
        assert name in LOSSY or (steps["num_wrong"] == 0).all(), name
        assert (steps["peak_memory_bytes"] > 0).all()
        moved[name] = steps["moved_experts"].sum() if "moved_experts" in steps else 0
    print("experts moved:", {name: int(n) for name, n in moved.items() if n})
    if routing == "stress_hot_spread":
        assert moved["hiermoe"] > 0 and moved["smartmoe_f1"] > 0


@pytest.mark.parametrize("model", ["qwen3_30b_a3b_narrow", "deepseek_v3_narrow"])
def test_models_train_with_the_same_loss_under_every_system(hiermoe: Command, store: RunStore, model: str) -> None:
    small = (f"steps={STEPS}", "sequences_per_step=16", "seq_length=128", f"model={model}", "wandb.mode=disabled")
    found: dict[str, pd.DataFrame] = {}
    for system in TRAINED:
        begun = time.monotonic()
        code, _, error = hiermoe("train", f"system={system}", *small, *ON_GPUS)
        assert code == 0, error
        (run,) = store.folder.glob(f"{system}-*")
        found[system] = store.read(run.name)
        print(f"{model} {system}: {time.monotonic() - begun:.0f} s", found[system]["loss"].tolist()[-1])
        assert (found[system]["alltoall_forward_ms"] > 0).all()
    stock = found["megatron"].groupby("iteration")["loss"].mean().tolist()
    assert len(stock) == STEPS and stock[-1] < stock[0]
    for system in TRAINED[1:]:
        assert found[system].groupby("iteration")["loss"].mean().tolist() == pytest.approx(stock, rel=1e-5), system
    assert found["hiermoe"]["moved_experts"].sum() > 0


def _dies_in_a_collective(rank: int, when: int) -> None:
    x_N = torch.ones(1024, device="cuda")
    for i in range(10**6):
        dist.all_reduce(x_N)
        torch.cuda.synchronize()
        if rank == 3 and i == when:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_rank_ends_the_others() -> None:
    begun = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 3 of 8 died by signal SIGKILL"):
        run_ranks(_dies_in_a_collective, NUM_RANKS, (20,), timedelta(seconds=60), device="cuda")
    assert time.monotonic() - begun < 60


def _asks_for_nothing(rank: int) -> None:
    if rank:
        dist.all_reduce(torch.ones(1, device="cuda"))
        torch.cuda.synchronize()
    else:
        time.sleep(3600)


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(RankFailedError, match="waits too long: rank 0 of 8 did not come: it was in _asks_for_nothing"):
        run_ranks(_asks_for_nothing, NUM_RANKS, (), timedelta(seconds=10), device="cuda")
