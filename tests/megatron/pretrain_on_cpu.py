"""Megatron-LM's own training loop on CPU ranks, with real flags and what `pretrain_gpt.py` passes to it, in float64."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hiermoe.megatron.standins import cpu

cpu.expect_fallbacks()

import megatron.training  # noqa: E402, F401 # pyright: ignore[reportMissingImports] - slow: once, for all ranks

from hiermoe.megatron.checkpoint import _writers_allowed  # noqa: E402
from hiermoe.narrow.precision import float32_means_float64, make_float64  # noqa: E402
from hiermoe.policies.protocol import PlacementUpdate, StepContext  # noqa: E402
from hiermoe.topology.cluster import Cluster  # noqa: E402
from hiermoe.topology.placement import Placement  # noqa: E402
from tests.megatron.moving import Shuffle, system  # noqa: E402

GAIN_MS = 0.25
FLAGS = """
--num-layers 2 --hidden-size 32 --ffn-hidden-size 32 --num-attention-heads 2 --seq-length 32
--max-position-embeddings 32 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
--attention-dropout 0 --hidden-dropout 0 --transformer-impl local --distributed-backend gloo
--num-experts 32 --moe-router-topk 4 --moe-ffn-hidden-size 16 --moe-router-dtype fp64
--moe-token-dispatcher-type alltoall --expert-model-parallel-size 4
--no-bias-swiglu-fusion --no-masked-softmax-fusion --no-gradient-accumulation-fusion --no-rope-fusion
--no-bias-dropout-fusion --no-persist-layer-norm
--use-distributed-optimizer --lr 1e-3 --lr-decay-style constant --micro-batch-size 1 --global-batch-size 8
--mock-data --tokenizer-type NullTokenizer --vocab-size 127 --split 90,5,5 --num-workers 0
--ckpt-format torch_dist --save-interval 5 --eval-interval 10 --eval-iters 1 --log-interval 1
--distributed-timeout-minutes 2
"""


@dataclass(frozen=True)
class Run:
    """One start of a training.

    Attributes:
        folder: for what rank 0 prints, losses and scalars.
        checkpoints: folder of them.
        iterations: that the training has in all.
        resumed: whether it goes on from the newest checkpoint.
        moving: whether the lines of this suite are there, with a policy that moves all experts after every iteration.
        hidden: whether they move beside the next iteration, and gradients and weights are exchanged beside it too.
        kill: rank that kills itself, and after which iteration; None for none.
    """

    folder: Path
    checkpoints: Path
    iterations: int
    resumed: bool = False
    moving: bool = False
    hidden: bool = False
    kill: tuple[int, int] | None = None

    @property
    def flags(self) -> list[str]:
        """Megatron's."""
        own = ["--train-iters", self.iterations, "--save", self.checkpoints, "--tensorboard-dir", self.board]
        load = ["--load", self.checkpoints] if self.resumed else []
        overlapped = ["--overlap-grad-reduce", "--overlap-param-gather"] if self.hidden else []
        return [*FLAGS.split(), *map(str, own + load), *overlapped]

    @property
    def board(self) -> Path:
        """Of TensorBoard."""
        return self.folder / "board"

    @property
    def log(self) -> Path:
        """What rank 0 printed."""
        return self.folder / "log.txt"

    def losses(self) -> dict[int, float]:
        """By iteration, from 1, as far as the run came."""
        lines = (self.folder / "losses.jsonl").read_text().splitlines()
        return dict(json.loads(line) for line in lines)


class ShuffleWithGain(Shuffle):
    """Every expert goes to a random slot after every step, for a gain that is made up."""

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate:
        update = super().decide(summed, placement, context)
        assert update is not None
        return PlacementUpdate(update.placement, GAIN_MS)


def train(rank: int, run: Run) -> None:
    """Train on this rank of a group, as `pretrain_gpt.py` does."""
    cpu.install()
    _stand_in_for_more_of_cuda()
    from megatron.core.datasets import utils
    from megatron.core.enums import ModelType
    from megatron.training import pretrain  # pyright: ignore[reportMissingImports]
    from megatron.training.argument_utils import (  # pyright: ignore[reportMissingImports]
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args  # pyright: ignore[reportMissingImports]

    utils.compile_helpers = lambda: None  # the wheel has them, and not what makes them
    sys.argv = ["pretrain_gpt.py", *run.flags]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(torch.distributed.get_world_size())}
    log = run.log if rank == 0 else Path(os.devnull)
    with (
        log.open("a") as file,
        redirect_stdout(file),
        _writers_allowed(),
        cpu.cuda_means_cpu(),
        float32_means_float64(),
    ):
        args = parse_and_validate_args()
        args.params_dtype = torch.float64
        _watch(run, args)
        if run.moving:
            from hiermoe.megatron.pretrain import place_experts

            policy = f"{ShuffleWithGain.__module__}.{ShuffleWithGain.__name__}"
            migration = "background" if run.hidden else "at_once"
            moved = system(policy, "hd1").model_copy(update={"migration": migration})
            place_experts(moved, cluster_of_ranks())
        model = gpt_config_from_args(args)
        model.pre_wrap_hooks = [_in_float64]
        datasets.is_distributed = True  # type: ignore[attr-defined]
        pretrain(pretrain_cfg_container_from_args(args, model), datasets, ModelType.encoder_or_decoder, forward_step)


def cluster_of_ranks() -> Cluster:
    """Of the four that a run has."""
    return Cluster.named("a6000_4x8").reduced(4)


def datasets(samples: Any, vp_stage: int | None = None) -> Any:
    """Megatron's mock data."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.training import get_args, get_tokenizer  # pyright: ignore[reportMissingImports]

    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, samples, lambda: True, config).build()


def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> Any:
    """One micro-batch."""
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_loss, batch["loss_mask"])


def _loss(mask: torch.Tensor, output: torch.Tensor) -> Any:
    mask = mask.view(-1).to(output.dtype)
    loss, tokens = (output.view(-1) * mask).sum(), mask.sum()
    return loss, tokens.to(torch.int), {"lm loss": torch.stack([loss.detach(), tokens])}


def _watch(run: Run, args: argparse.Namespace) -> None:
    """Write every loss, and kill whom the run says."""
    from megatron.training import training  # pyright: ignore[reportMissingImports]

    stock = training.train_step

    def train_step(
        forward_step_func: Any, data_iterator: Any, model: Any, optimizer: Any, *arguments: Any, **named: Any
    ) -> Any:
        result = stock(forward_step_func, data_iterator, model, optimizer, *arguments, **named)
        if args.rank == 0:
            with (run.folder / "losses.jsonl").open("a") as file:
                file.write(json.dumps([args.curr_iteration + 1, float(result[0]["lm loss"])]) + "\n")
        if run.kill == (args.rank, args.curr_iteration + 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    training.train_step = train_step


def _in_float64(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    for chunk in chunks:
        make_float64(chunk)
    return chunks


def _stand_in_for_more_of_cuda() -> None:
    """What the training loop asks of CUDA beyond what the model and the optimizer do."""
    from megatron.training import training  # pyright: ignore[reportMissingImports]

    load = training.load_checkpoint

    # Without Transformer Engine's optimizer stock Megatron fails to load the distributed one: it asks torch's Adam how
    # often it has stepped before it knows, writes to weights that need gradients, and loses the count of steps.
    @torch.no_grad()
    def load_checkpoint(model: Any, optimizer: Any, *arguments: Any, **named: Any) -> Any:
        for part in optimizer.chained_optimizers:
            part._init_optimizer_states_with_dummy_values()
        loaded = load(model, optimizer, *arguments, **named)
        for part in optimizer.chained_optimizers:
            for state in part.optimizer.state.values():
                state["step"] = torch.tensor(float(loaded[0]))
        return loaded

    training.load_checkpoint = load_checkpoint
    training.initialize_megatron = partial(training.initialize_megatron, allow_no_cuda=True)
    cuda: Any = torch.cuda
    cuda.device_count = lambda: 1  # it makes no process groups without one
    cuda.is_available = lambda: False  # which torch's optimizers and data loaders ask
    cuda.set_device = lambda _device: None
    cuda.set_rng_state = lambda state, *_a, **_k: torch.set_rng_state(state)
    cuda.get_device_properties = lambda *_a: SimpleNamespace(major=9, minor=0, total_memory=2**36, name="none")
    cuda.get_device_capability = lambda *_a: (9, 0)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *_a: 0)
    torch.Tensor.cuda = lambda self, *_a, **_k: self  # type: ignore[method-assign,assignment]
    torch.nn.Module.cuda = lambda self, *_a, **_k: self  # type: ignore[method-assign,assignment]
