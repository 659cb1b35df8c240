"""A training run of one's own leaves a file a rank, and these become one trace of what the routers chose."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hiermoe.narrow.corpus import Corpus, training_corpus
from hiermoe.narrow.training_config import TrainingConfig
from hiermoe.ranks.launch import run_ranks
from hiermoe.ranks.server import RankFailedError
from hiermoe.routing.importers import megatron_jsonl
from hiermoe.routing.importers.as_trace import to_trace
from hiermoe.routing.importers.recording import Source
from tests.conftest import Command
from tests.megatron.parallel_model import EXPERTS, SEQUENCE, TOPK, VOCABULARY, ParallelModel
from tests.narrow.tiny_training import tiny_training

TIMEOUT = timedelta(minutes=10)
STEPS, TRAINED = 3, 4


def train_with_trace(rank: int, config: TrainingConfig, corpus: Corpus, folder: str, max_bytes: int) -> dict[str, Any]:
    """Four steps, of which three are asked for; what the stock routers put out is watched from outside."""
    from megatron.core.transformer.moe.router import TopKRouter

    from hiermoe.megatron.rank_trace import RankTrace
    from hiermoe.narrow.trainer import Trainer

    trainer = Trainer(config, TIMEOUT)
    chosen: dict[int, list[torch.Tensor]] = {}
    routers = {m.layer_number: m for m in trainer.model.modules() if isinstance(m, TopKRouter) and m.layer_number}

    def watch(router: torch.nn.Module, _inputs: object, output: Any) -> None:
        chosen.setdefault(int(router.layer_number), []).append(output[1].bool())  # type: ignore[arg-type]

    for router in routers.values():
        router.register_forward_hook(watch)
    trace = RankTrace(trainer.model, folder, STEPS, first_step=10, max_bytes=max_bytes)
    for step in range(TRAINED):
        trainer.step(trainer.batch(corpus, step))
        trace.step()
    return {
        "chosen": {layer: torch.stack(maps) for layer, maps in chosen.items()},  # [step, N, E]
        "left": [layer for layer, router in routers.items() if "routing" in vars(router)],
        "steps": trace.steps,
    }


def traced(config: TrainingConfig, folder: Path, max_bytes: int = 2**30) -> list[dict[str, Any]]:
    arguments = (config, training_corpus(config), str(folder), max_bytes)
    return run_ranks(train_with_trace, config.world_size, arguments, TIMEOUT)


def test_files_of_all_ranks_become_one_trace_of_what_the_routers_chose(
    cache_dir: str, tmp_path: Path, hiermoe: Command
) -> None:
    results = traced(tiny_training("qwen3_30b_a3b", cache_dir), tmp_path / "theirs")
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == [
        "router_trace_rank0.jsonl",
        "router_trace_rank1.jsonl",
    ]
    output = str(tmp_path / "a.trace")
    code, out, err = hiermoe(
        "trace", "import", "megatron", str(tmp_path / "theirs"), "--output", output, "--num-experts", "8"
    )
    assert code == 0, err
    assert "3 iterations x 2 layers x 2 ranks x 64 tokens x 2 of 8 experts" in out
    source = Source(tmp_path / "theirs")
    trace = to_trace(megatron_jsonl.read(source), source, "megatron", "tiny", 8, "test")
    assert trace.metadata.training_step == [10, 11, 12]
    assert trace.metadata.layers == [1, 2]
    for rank, result in enumerate(results):
        for position, layer in enumerate(trace.metadata.layers):
            # Routers see position after position of all sequences; the trace has sequence after sequence.
            seen = result["chosen"][layer][:STEPS].unflatten(1, (16, -1)).transpose(1, 2).flatten(1, 2)
            ids = torch.from_numpy(trace.expert_ids[:, position, rank].astype(np.int64))
            assert torch.equal(torch.zeros_like(seen).scatter(2, ids, True), seen)
        assert result["left"] == [], "the model is as it was"


def pipelined_with_trace(
    rank: int, has_experts: list[int], virtual: int | None, predicted: int, folder: str
) -> list[int]:
    """Two steps of four micro-batches, the second of them in a run that resumes after a killed one got further."""
    from hiermoe.megatron.rank_trace import RankTrace
    from hiermoe.megatron.recorder import find_routers

    pipelined = ParallelModel(has_experts, virtual=virtual, predicted=predicted)
    with pytest.raises(ValueError, match=r"^layers=\[9\] have no router; MoE layers are "):
        RankTrace([*pipelined.chunks], folder, layers=[9])  # on every rank, or some would wait for others
    batches = torch.randint(VOCABULARY, (2, 4, 2, SEQUENCE), generator=torch.Generator().manual_seed(0))
    killed = RankTrace([*pipelined.chunks], folder, steps=5)
    for batch in batches:
        pipelined.step(batch)
        killed.step()
    killed.close()
    if killed.path is not None:
        with killed.path.open("a") as file:
            file.write('{"step": 1, "block": "dec')  # as far as it came
    trace = RankTrace([*pipelined.chunks], folder, steps=1, first_step=1)
    pipelined.step(batches[1])
    trace.step()
    trace.close()

    return sorted(find_routers([*pipelined.chunks], may_lack=True))


@pytest.mark.parametrize(
    ("has_experts", "virtual", "predicted", "layers"),
    [
        pytest.param([0, 0, 1, 1], None, 1, [[], [3, 4]], id="one stage is dense, the other predicts two tokens"),
        pytest.param([0, 1, 1, 1], 2, 0, [[3], [2, 4]], id="two chunks a stage", marks=pytest.mark.slow),
    ],
)
def test_stages_of_a_pipeline_write_the_layers_that_they_have(
    tmp_path: Path, has_experts: list[int], virtual: int | None, predicted: int, layers: list[list[int]]
) -> None:
    arguments = (has_experts, virtual, predicted, str(tmp_path / "theirs"))
    assert run_ranks(pipelined_with_trace, 2, arguments, TIMEOUT) == layers
    source = Source(tmp_path / "theirs", pipeline=1)
    trace = to_trace(megatron_jsonl.read(source), source, "megatron", "tiny", EXPERTS, "test")
    assert trace.metadata.layers == sorted(layers[0] + layers[1])
    assert trace.metadata.training_step == [0, 1]
    assert trace.expert_ids.shape == (2, len(trace.metadata.layers), 1, 4 * 2 * SEQUENCE, TOPK)


@pytest.mark.slow
def test_a_bound_on_the_file_stops_all_ranks_after_the_same_step(cache_dir: str, tmp_path: Path) -> None:
    # 64 tokens of two layers, two experts of a digit each: at most 2 x (64 x 8 + 160) = 1344 bytes a step.
    results = traced(tiny_training("qwen3_30b_a3b", cache_dir), tmp_path, max_bytes=3000)
    assert [result["steps"] for result in results] == [2, 2]
    assert all(path.stat().st_size <= 3000 for path in tmp_path.iterdir())
    assert megatron_jsonl.read(Source(tmp_path)).steps == (10, 11)


@pytest.mark.slow
def test_a_bound_below_one_step_is_refused(cache_dir: str, tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="max_bytes=1000 does not hold a step"):
        traced(tiny_training("qwen3_30b_a3b", cache_dir), tmp_path, max_bytes=1000)


def replicated_with_trace(rank: int, folder: str) -> bool:
    """Whether this rank has a file: two tensor-parallel ranks, two replicas of the experts."""
    from hiermoe.megatron.rank_trace import RankTrace

    model = ParallelModel([1], stages=1, ep_size=2, tensor=2, distributed=True)
    trace = RankTrace([*model.chunks], folder, steps=1)
    model.step(torch.randint(VOCABULARY, (2, 2, SEQUENCE), generator=torch.Generator().manual_seed(rank // 2)))
    trace.step()
    return trace.path is not None


@pytest.mark.slow
def test_replicas_and_parts_of_sequences_each_write_their_tokens(tmp_path: Path) -> None:
    assert run_ranks(replicated_with_trace, 4, (str(tmp_path / "theirs"),), TIMEOUT) == [True] * 4
    source = Source(tmp_path / "theirs", pipeline=1)
    trace = to_trace(megatron_jsonl.read(source), source, "megatron", "tiny", EXPERTS, "test")
    assert trace.metadata.layers == [1]
    assert trace.expert_ids.shape == (1, 1, 4, 2 * 2 * SEQUENCE // 2, TOPK)  # half of each sequence
