"""`hiermoe record`: train a narrow model on real text and record what its routers choose, step after step."""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hiermoe import __version__
from hiermoe.narrow.corpus import Corpus, training_corpus
from hiermoe.narrow.record_config import RecordConfig
from hiermoe.ranks.launch import preload, run_ranks
from hiermoe.routing.trace import RoutingTrace, TraceMetadata

_LINE_EVERY = 20  # steps, where there is no terminal for a bar


def record(config: RecordConfig, command: str) -> None:
    """Train, record, and write the trace to `config.output`, relative to the project's root.

    Args:
        config: The run.
        command: How it was called; stated in the trace.

    Raises:
        RankFailedError: A rank failed; no trace is written.
    """
    timeout = timedelta(minutes=config.timeout_minutes)
    preload("hiermoe.narrow.preload")
    run_ranks(train_and_record, config.world_size, (config, training_corpus(config), command, timeout), timeout)


def train_and_record(rank: int, config: RecordConfig, corpus: Corpus, command: str, timeout: timedelta) -> None:
    """One rank of the run; rank 0 writes the trace. *Collective: every rank of the world must call it.*"""
    from hiermoe.megatron.standins import cpu

    cpu.expect_fallbacks()
    # Only the ranks need megatron; the fork server has imported it for them.
    from hiermoe.megatron.recorder import RouterRecorder, gather_ranks
    from hiermoe.narrow.trainer import Trainer

    trainer = Trainer(config, timeout)
    layers = config.recorded_layers
    recorded: list[np.ndarray] = []
    losses: list[float] = []
    with RouterRecorder(trainer.model, config.num_recorded, layers) as recorder, _progress(rank, config) as show:
        for step in range(config.train_steps + config.record_steps):
            started = time.perf_counter()
            loss = trainer.step(trainer.batch(corpus, step))
            drained = recorder.drain()
            # [layer, b * s, k]: token after token of a sequence, sequence after sequence.
            ids_LTK = torch.stack([drained[layer][0].transpose(0, 1).flatten(0, 1) for layer in layers])
            gathered = gather_ranks(ids_LTK)
            if gathered is None:
                continue
            ids_LNK = gathered.transpose(0, 1).flatten(1, 2).numpy()
            loads = max_over_mean_load(ids_LNK, config.model.num_experts, config.model.topk)
            show(step, loss, loads.tolist(), time.perf_counter() - started)
            losses.append(loss)
            if step >= config.train_steps:
                recorded.append(ids_LNK.astype(np.uint16))
    if rank == 0:
        write_trace(config, corpus, command, np.stack(recorded), losses)


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


def write_trace(config: RecordConfig, corpus: Corpus, command: str, ids_ILNK: np.ndarray, losses: list[float]) -> None:
    """Lay the recorded steps out over the logical ranks, and save them with how they came to be.

    Args:
        config: The run.
        corpus: What it was trained on.
        command: How it was called.
        ids_ILNK: Expert ids [iteration, layer, tokens of a step, num_recorded] in global token order.
        losses: Loss of every training step, the recorded ones last.
    """
    model, iterations = config.model, len(ids_ILNK)
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
            training_step=list(range(config.train_steps, config.train_steps + iterations)),
            loss=[*losses[-iterations:]],
            layers=config.recorded_layers,
            how_made=command,
            versions={
                "python": platform.python_version(),
                "hiermoe": __version__,
                **{name: version(name) for name in ("torch", "megatron-core", "tokenizers")},
            },
            notes=_notes(config, losses, loads_IL),
        ),
    )
    trace.save(Path(config.output).expanduser())


def _notes(config: RecordConfig, losses: list[float], loads_IL: np.ndarray) -> str:
    layers = "; ".join(
        f"layer {layer}: max/mean expert load per step {load.mean():.2f} on average, {load.max():.2f} at most"
        for layer, load in zip(config.recorded_layers, loads_IL.T, strict=True)
    )
    return (
        f"Layers are numbered from 1. {config.train_steps} steps of {config.sequences_per_step} sequences of "
        f"{config.seq_length} tokens before the first recorded step, Adam at {config.learning_rate:g}, {config.dtype}. "
        f"Loss of the first training step {losses[0]:.3f}. {layers}."
    )


@contextmanager
def _progress(rank: int, config: RecordConfig) -> Iterator[Callable[[int, float, list[float], float], None]]:
    """A progress bar on a terminal, a line every 20 steps elsewhere; nothing on ranks other than 0.

    Yields:
        Shows one finished step, given its number (from 0), the mean loss per token, the most loaded expert over the
        mean expert of every recorded layer, and the seconds that the step took.
    """
    total, so_far = config.train_steps + config.record_steps, 0.0
    console = Console(quiet=rank != 0)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=rank != 0 or not console.is_terminal,
    )
    task = bar.add_task("training", total=total, state="")

    def update(step: int, loss: float, loads: list[float], seconds: float) -> None:
        nonlocal so_far
        so_far += seconds
        phase = "training" if step < config.train_steps else "recording"
        state = f"loss {loss:.3f}  max/mean load {' '.join(f'{load:.2f}' for load in loads)}"
        bar.update(task, description=phase, completed=step + 1, state=state)
        if not console.is_terminal and (step % _LINE_EVERY == 0 or step + 1 == total):
            per_step = so_far / (step + 1)
            left_minutes = per_step * (total - step - 1) / 60
            console.print(
                f"{phase} step {step + 1}/{total}  {state}  {per_step:.2f} s/step  {left_minutes:.1f} min left",
                highlight=False,
                soft_wrap=True,
            )

    with bar:
        yield update
