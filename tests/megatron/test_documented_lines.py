"""The lines of Python that README and docs show for a training of one's own, run in one."""

from pathlib import Path
from typing import Any

import torch

from hiermoe.megatron.standins import cpu

cpu.expect_fallbacks()

from hiermoe.megatron.attach import attach, detach, moe_layers  # noqa: E402
from hiermoe.megatron.recorder import RouterRecorder, gather_ranks  # noqa: E402
from hiermoe.narrow.corpus import Corpus, training_corpus  # noqa: E402
from hiermoe.narrow.training_config import TrainingConfig  # noqa: E402
from tests.documents.documents import python_blocks  # noqa: E402
from tests.megatron.moving import STOCK, Run, cluster_of, launch, small  # noqa: E402

CLUSTER = '"a6000_4x8"'  # of 32 GPUs, where the test has four
STEPS = 3


def follow(rank: int, config: TrainingConfig, corpus: Corpus, blocks: list[str], folder: str) -> dict[str, Any]:
    """Run blocks one after another in a training without any system, as their pages show them."""
    trainer = Run(config, corpus, STOCK).trainer
    detach(trainer.model)
    losses: list[float] = []

    def train_step() -> None:
        losses.append(trainer.step(trainer.batch(corpus, len(losses))))

    class FewSteps:
        """True until a trace of a few steps is full."""

        def __bool__(self) -> bool:
            return len(losses) < STEPS + 2

    names: dict[str, Any] = {
        "model": trainer.model, "optimizer": trainer.optimizer, "cluster": cluster_of(config), "torch": torch,
        "attach": attach, "RouterRecorder": RouterRecorder, "gather_ranks": gather_ranks, "train_step": train_step,
        "training": FewSteps(),
    }  # fmt: skip
    for block in blocks:
        changed = block.replace(CLUSTER, "cluster").replace('"trace/"', repr(folder)).replace("128", str(STEPS))
        changed = changed.replace("num_recorded=10", "num_recorded=4").replace("optimizer.step()\n", "")
        changed = changed.replace("placement.step(", "train_step()\nplacement.step(")  # a step is the optimizer's too
        exec(compile(changed.replace("layers=[1]", "layers=None"), "page", "exec"), names)
    names["attached"] = type(moe_layers(trainer.model)[0].token_dispatcher).__name__
    return {name: names.get(name) for name in ("steps", "attached")} | {"losses": losses}


def run_blocks(page: str, cache_dir: str, tmp_path: Path) -> list[dict[str, Any]]:
    config = small("qwen3_30b_a3b", cache_dir)
    blocks = [block for block in python_blocks()[page] if "model" in block]
    assert blocks
    return launch(follow, config, training_corpus(config), blocks, str(tmp_path / "trace"))


def test_two_lines_of_the_readme_attach_a_system_that_trains(cache_dir: str, tmp_path: Path) -> None:
    for seen in run_blocks("README.md", cache_dir, tmp_path):
        assert seen["attached"] == "StagedTokenDispatcher" and len(seen["losses"]) == 1


def test_lines_for_a_training_of_ones_own(cache_dir: str, tmp_path: Path) -> None:
    for seen in run_blocks("docs/training.md", cache_dir, tmp_path):
        assert seen["attached"] == "StagedTokenDispatcher" and len(seen["losses"]) == 1


def test_lines_that_record_a_training_leave_a_file_a_rank_and_the_steps(cache_dir: str, tmp_path: Path) -> None:
    ranks = run_blocks("results/traces/README.md", cache_dir, tmp_path)
    files = sorted(path.name for path in (tmp_path / "trace").glob("*.jsonl"))
    assert files == [f"router_trace_rank{rank}.jsonl" for rank in range(4)]
    assert len(ranks[0]["steps"]) == STEPS and ranks[1]["steps"] == []
