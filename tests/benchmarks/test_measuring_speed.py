"""What it costs to measure where nothing moves: ``pytest tests/benchmarks --benchmark-only -k measuring``.

Two gloo ranks train a narrow Qwen3, with and without a policy that measures as HiermoE's does and never moves, in
turns. A step on a CPU is longer than one on a GPU, and so is measuring, which the CPU does either way.
"""

import time
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from hiermoe.model import ModelConfig
from hiermoe.narrow.corpus import Corpus, training_corpus
from hiermoe.narrow.training_config import TrainingConfig
from hiermoe.policies.hierd_es import HierDESPolicy
from hiermoe.policies.protocol import PlacementUpdate, StepContext
from hiermoe.records.project import CONF
from hiermoe.topology.placement import Placement
from tests.benchmarks.conftest import RATIOS
from tests.megatron.moving import launch, small, system

ROUNDS = 8


class Lookout(HierDESPolicy):
    """Measures and sums what HierD-ES needs, and leaves it at that."""

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        """Nothing."""
        return None


def train(rank: int, config: TrainingConfig, corpus: Corpus) -> dict[str, float]:
    """Milliseconds of a step with measuring, without, and of measuring alone, and with sums over ranks."""
    from tests.megatron.moving import Run

    run = Run(config, corpus, system(f"{__name__}.Lookout", "hd1"))
    observers = [layer.dispatcher.observe for layer in run.placement.layers]
    laps: dict[str, list[float]] = {"with": [], "without": [], "measuring": [], "all": []}
    for step in range(2 * ROUNDS + 2):  # the first two warm up
        name = ("with", "without")[step % 2]
        for layer, observe in zip(run.placement.layers, observers, strict=True):
            layer.dispatcher.observe = observe if name == "with" else None
        batch = run.trainer.batch(corpus, step)
        dist.barrier()
        started = time.perf_counter()
        run.trainer.step(batch)
        if name == "with":
            laps["measuring"].append(sum(layer.measuring_ms for layer in run.placement.layers))
            assert not run.placement.step(run.trainer.optimizer)
            laps["all"].append(run.placement.planning_ms)
        dist.barrier()
        laps[name].append((time.perf_counter() - started) * 1e3)
    return {name: min(times[1:]) for name, times in laps.items()}


def test_measuring_beside_a_step(benchmark: Any, request: pytest.FixtureRequest, tmp_path: Any) -> None:
    shape = ModelConfig.from_yaml(CONF / "model" / "qwen3_30b_a3b_narrow.yaml").model_copy(update={"num_layers": 2})
    values = small("qwen3_30b_a3b", str(tmp_path), ep_size=2, dtype="fp32", corpus_files=200).model_dump()
    values |= {"model": shape.model_copy(update={"vocab_size": 1024}), "seq_length": 256, "sequences_per_step": 8}
    config = TrainingConfig.model_validate(values)
    seen = benchmark.pedantic(launch, (train, config, training_corpus(config)), rounds=1)[0]
    benchmark.extra_info["with over without"] = seen["with"] / seen["without"]
    benchmark.extra_info["measuring and summing, share of a step"] = seen["all"] / seen["without"]
    rows = request.config.stash[RATIOS].rows
    rows.append(("a training step without measuring (elapsed)", seen["without"], "with it", seen["with"]))
    for name, part in (("measuring", "measuring"), ("measuring, and sums over ranks", "all")):
        rows.append((f"{name} (elapsed)", seen[part], "a training step without", seen["without"]))
