"""What one GPU can tell: dispatchers on CUDA tensors are exact, and Megatron trains over NCCL under every system.

NCCL takes one rank a GPU, so what several ranks exchange goes over gloo here, between CUDA tensors.
"""

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from hiermoe.ranks.places import NewRanks
from hiermoe.records.store import RunStore
from hiermoe.runs.execute import execute_together
from tests.conftest import Command, Composer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
# Systems whose experts move need point-to-point messages, which gloo has for CPU tensors alone.
STATIC = ("megatron", "tutel_2dh", "tutel_2dh_padded", "h2", "h3", "hd1", "hd2", "hd3", "hd_moe")
TRAINED = ("megatron", "hd1", "hd_moe", "hiermoe")
STEPS = 12
ONE_GPU = """
name: one_gpu
description: one GPU
world: {alpha_ms: 0, beta_ms_per_byte: 0, source: nothing is sent}
levels: [{name: gpu, groups: 1, link_gb_per_s: 1}]
"""


@pytest.mark.parametrize("routing", ["recorded", "stress_hot_spread"])
def test_every_element_is_right_on_a_gpu(composed: Composer, store: RunStore, routing: str) -> None:
    sizes = (
        "measure=replay",
        "ranks=local",
        "world_size=8",
        "tokens_per_rank=512",
        "iterations=4",
        f"routing={routing}",
    )
    configs = [composed(*sizes, f"system={system}") for system in STATIC]
    world = NewRanks(configs[0].cluster.hierarchy, timedelta(minutes=2), device="cuda")
    outcomes = execute_together(configs, store, world=world)
    assert [outcome.status for outcome in outcomes] == ["ok"] * len(STATIC), outcomes
    for outcome in outcomes:
        records = store.read(outcome.run_id)
        steps = records[records["phase"] == "step"]
        assert len(steps) == 8 * 4 and (steps["num_wrong"] == 0).all()
        assert (steps["peak_memory_bytes"] > 0).all()


def test_models_train_over_nccl_with_the_same_loss_under_every_system(
    hiermoe: Command, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that torchrun would start, in this process, as an allocation of one GPU."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    for name, value in (alone | {"MASTER_PORT": "29555"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("hiermoe.records.groups.CLUSTERS", tmp_path)
    (tmp_path / "one_gpu.yaml").write_text(ONE_GPU)
    losses = {}
    for model in ("qwen3_30b_a3b_narrow", "deepseek_v3_narrow"):
        for system in TRAINED:
            small = ("world_size=1", f"steps={STEPS}", "sequences_per_step=4", "seq_length=256", f"model={model}")
            small += ("cluster=one_gpu", "wandb.mode=disabled")
            code, _, error = hiermoe("train", "ranks=allocation", f"system={system}", *small)
            assert code == 0, error
            (run,) = store.folder.glob(f"{system}-*")
            records = store.read(run.name)
            assert set(records["source"]) == {"cluster"} and len(records) == STEPS
            assert (records["alltoall_forward_ms"] > 0).all() and (records["alltoall_backward_ms"] > 0).all()
            losses[system] = records["loss"].tolist()
            shutil.rmtree(run)
        assert losses["megatron"][-1] < losses["megatron"][0]  # of other tokens, so a few steps would not tell
        for system in TRAINED[1:]:
            assert losses[system] == pytest.approx(losses["megatron"], rel=1e-5), system
