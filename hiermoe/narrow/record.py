"""`hiermoe record`: train a narrow model on real text and record what its routers choose, step after step."""

import ctypes
import platform
import shutil
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from hiermoe import __version__
from hiermoe.megatron.checkpoint_folder import finished_steps, newest_first
from hiermoe.narrow.corpus import Corpus, training_corpus
from hiermoe.narrow.record_config import RecordConfig
from hiermoe.narrow.recording_progress import SHOWN_EVERY, recording_progress
from hiermoe.ranks.launch import run_ranks
from hiermoe.ranks.server import preload
from hiermoe.records.project import in_workplace
from hiermoe.routing.trace import RoutingTrace, TraceMetadata

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # man 3 mallopt


def record(config: RecordConfig, command: str) -> None:
    """Train, record, and write a trace of every stage.

    A run that was ended goes on from its newest checkpoint, and gives the same traces as one that was not.

    Args:
        config: The run.
        command: How it was called; stated in the traces.

    Raises:
        RankFailedError: A rank failed; traces of finished stages and checkpoints stay.
    """
    timeout = timedelta(minutes=config.timeout_minutes)
    preload("hiermoe.narrow.preload")
    corpus = training_corpus(config)
    checkpoints = in_workplace(config.checkpoint_dir) / config.training_key(corpus.key)
    # A stage whose trace is not there is recorded (again): no later checkpoint is of use.
    missing = [stage.after for name, stage in config.stages.items() if not config.path_of(name).exists()]
    for checkpoint in newest_first(checkpoints):
        if finished_steps(checkpoint) > min(missing, default=0):
            shutil.rmtree(checkpoint)
    run_ranks(train_and_record, config.world_size, (config, corpus, command, timeout, checkpoints), timeout)
    shutil.rmtree(checkpoints, ignore_errors=True)


def train_and_record(
    rank: int, config: RecordConfig, corpus: Corpus, command: str, timeout: timedelta, checkpoints: Path
) -> None:
    """One rank of the run; rank 0 writes the traces. *Collective: every rank of the world must call it.*"""
    from hiermoe.megatron.standins import cpu

    cpu.expect_fallbacks()
    # Only the ranks need megatron; the fork server has imported it for them.
    from hiermoe.megatron.recorder import RouterRecorder, gather_ranks
    from hiermoe.narrow.joint_compute import compute_jointly
    from hiermoe.narrow.trainer import Trainer

    _keep_freed_memory()
    trainer = Trainer(config, timeout, compute_jointly)
    start = trainer.resume(checkpoints)
    layers = config.recorded_layers
    recorded: list[np.ndarray] = []
    losses: list[float] = []

    def save_at_times(step: int) -> None:
        if (step + 1) % config.checkpoint_every == 0:
            trainer.save(checkpoints, step + 1, keep=2)

    with recording_progress(rank, config, start) as show:
        for step in range(start, config.last_step):
            stage = config.stage_at(step)
            trainer.balance(*config.balancing_warmup.at(step))
            if stage is None and step % SHOWN_EVERY and step + 1 < config.last_step:
                show(step, trainer.step(trainer.batch(corpus, step)), None)
                save_at_times(step)
                continue
            with RouterRecorder(trainer.model, config.num_recorded, layers) as recorder:
                loss = trainer.step(trainer.batch(corpus, step))
            drained = recorder.drain()
            own_LNK = torch.stack([drained[layer][0].flatten(0, 1) for layer in layers]).numpy()
            show(step, loss, max_over_mean_load(own_LNK, config.model.num_experts, config.model.topk))
            if stage is None:
                save_at_times(step)
                continue
            # [layer, b * s, k]: token after token of a sequence, sequence after sequence.
            ids_LTK = torch.stack([drained[layer][0].transpose(0, 1).flatten(0, 1) for layer in layers])
            gathered = gather_ranks(ids_LTK)
            if gathered is None:
                continue
            ids_LNK = gathered.transpose(0, 1).flatten(1, 2).numpy()
            losses.append(loss)
            recorded.append(ids_LNK.astype(np.uint16))
            if config.stage_at(step + 1) != stage:
                write_trace(config, stage, corpus, command, np.stack(recorded), losses)
                recorded, losses = [], []
    if config.model_output is not None:
        trainer.save(in_workplace(config.model_output), config.last_step, keep=1)


def _keep_freed_memory() -> None:
    """Let the C library keep what is freed. It is asked for again in the next layer, and new pages take their time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if mallopt is not None:
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26)):
            mallopt(parameter, value)


def max_over_mean_load(ids_LNK: np.ndarray, num_experts: int, topk: int) -> np.ndarray:
    """Load of the most loaded expert over the mean load, in one step.

    Args:
        ids_LNK: Expert ids of one step, router's choice first.
        num_experts: Experts of a layer.
        topk: Experts that the router chooses.

    Returns:
        [layer] ratios, at least 1.
    """
    loads = np.stack([np.bincount(ids_NK[:, :topk].ravel(), minlength=num_experts) for ids_NK in ids_LNK])
    return loads.max(axis=1) / loads.mean(axis=1)


def write_trace(
    config: RecordConfig, stage: str, corpus: Corpus, command: str, ids_ILNK: np.ndarray, losses: list[float]
) -> None:
    """Lay a stage's steps out over the logical ranks, and save them with how they came to be.

    Args:
        config: The run.
        stage: Name of the stage.
        corpus: What it was trained on.
        command: How it was called.
        ids_ILNK: Expert ids [iteration, layer, tokens of a step, num_recorded] in global token order.
        losses: Loss of each of these steps.
    """
    model, iterations, after = config.model, len(ids_ILNK), config.stages[stage].after
    tokens = config.tokens_per_step // config.logical_ranks
    shape = (iterations, len(config.recorded_layers), config.logical_ranks, tokens, config.num_recorded)
    loads_IL = np.stack([max_over_mean_load(ids_LNK, model.num_experts, model.topk) for ids_LNK in ids_ILNK])
    trace = RoutingTrace(
        expert_ids=ids_ILNK.reshape(shape),
        num_tokens=np.full((iterations, config.logical_ranks), tokens, dtype=np.int32),
        metadata=TraceMetadata(
            model=model.name,
            num_experts=model.num_experts,
            topk=model.topk,
            num_recorded=config.num_recorded,
            router=model.router.describe(),
            corpus=corpus.describe(),
            vocabulary=corpus.vocabulary,
            seed=config.seed,
            training_step=list(range(after, after + iterations)),
            loss=[*losses],
            layers=config.recorded_layers,
            how_made=command,
            versions={
                "python": platform.python_version(),
                "hiermoe": __version__,
                **{name: version(name) for name in ("torch", "megatron-core", "tokenizers")},
            },
            notes=_notes(config, stage, loads_IL),
        ),
    )
    trace.save(config.path_of(stage))


def _notes(config: RecordConfig, stage: str, loads_IL: np.ndarray) -> str:
    layers = "; ".join(
        f"layer {layer}: max/mean expert load per step {load.mean():.2f} on average, {load.max():.2f} at most"
        for layer, load in zip(config.recorded_layers, loads_IL.T, strict=True)
    )
    after, warmup = config.stages[stage].after, config.balancing_warmup
    return (
        f"Layers are numbered from 1. Stage {stage}: {after} steps of {config.sequences_per_step} sequences of "
        f"{config.seq_length} tokens, {after * config.tokens_per_step / 1e6:.1f} million tokens, before the first "
        f"recorded step. Adam at {config.learning_rate:g}, {config.dtype}. Auxiliary loss {warmup.aux_loss_times:g} "
        f"times, rate of any expert bias {warmup.bias_rate_times:g} times as much at first, falling geometrically over "
        f"{warmup.steps} steps. {layers}."
    )
