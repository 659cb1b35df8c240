"""One rank's share of training a stock Megatron-Core model with expert parallelism."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module

from hiermoe.megatron.checkpoint import load_checkpoint, load_latest, save_checkpoint
from hiermoe.megatron.expert_placement import ExpertPlacement
from hiermoe.megatron.standins import cpu, without_te
from hiermoe.narrow.corpus import Corpus
from hiermoe.narrow.models import build_model
from hiermoe.narrow.precision import PARAMS_DTYPE, float32_means_float64, make_float64
from hiermoe.narrow.training_config import TrainingConfig


class Diverged(ValueError):
    """The loss or its gradient is no number any more."""


class Trainer:
    """Model, optimizer and learning-rate schedule of one rank.

    *Collective: every rank of the world must build it and call its methods.*

    Attributes:
        model: The model, wrapped for data parallelism.
        optimizer: Megatron's optimizer.
        schedule: Its learning-rate schedule.
    """

    def __init__(
        self,
        config: TrainingConfig,
        timeout: timedelta,
        prepare: Callable[[GPTModel], object] = lambda model: None,
        device: str = "cpu",
    ) -> None:
        """Set up Megatron's process groups, unless another trainer of this process has, and build everything.

        Args:
            config: The run; the world has `config.world_size` ranks, and all trainers of it the same `ep_size`.
            timeout: Of Megatron's process groups.
            prepare: Called with the built model before it is wrapped, to change it.
            device: cpu: stand-ins for CUDA are installed in this process; cuda: the current GPU.
        """
        self._device = device
        if device == "cpu":
            cpu.install()
        without_te.install()
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(
                expert_model_parallel_size=config.ep_size,
                distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60)),
            )
        torch.manual_seed(config.seed)
        model_parallel_cuda_manual_seed(config.seed)
        self._config = config
        self._precision = float32_means_float64 if config.dtype == "fp64" else nullcontext
        with cpu.cuda_means_cpu(), self._precision():
            model = build_model(
                config.model,
                seq_length=config.seq_length,
                ep_size=config.ep_size,
                params_dtype=PARAMS_DTYPE[config.dtype],
                recompute=config.recompute,
            )
        if device == "cuda":
            model.cuda()  # Megatron makes the router and torch's norms on the CPU
        if config.dtype == "fp64":
            make_float64(model)
        prepare(model)
        with cpu.cuda_means_cpu(), self._precision():
            self.model = DistributedDataParallel(
                model.config,
                DistributedDataParallelConfig(
                    overlap_grad_reduce=config.overlap,
                    overlap_param_gather=config.overlap and config.distributed_optimizer,
                    use_distributed_optimizer=config.distributed_optimizer,
                    grad_reduce_in_fp32=config.dtype == "bf16",
                ),
                Float16Module(model.config, model) if config.dtype == "bf16" else model,
            )
            self.model.broadcast_params()
            self.optimizer = get_megatron_optimizer(_optimizer_config(config), [self.model])
        for group in self.optimizer.param_groups:
            group["fused"] = True  # torch's Adam, in one pass over each parameter instead of a dozen
        self.schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=config.learning_rate,
            min_lr=config.learning_rate,
            lr_warmup_steps=config.lr_warmup_steps,
            lr_decay_steps=config.lr_warmup_steps + 1,  # must be more, and says nothing of a constant rate
            lr_decay_style="constant",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        self.schedule.step(1)  # otherwise the first step's learning rate is 0
        self.model.train()
        self._finished, self._last_loss = 0, math.nan

    def batch(self, corpus: Corpus, step: int) -> torch.Tensor:
        """This rank's sequences of a step: int64 [b, s + 1], inputs and, shifted by one, targets."""
        share = self._config.sequences_per_rank
        sequences = corpus.step_batch(step, self._config.sequences_per_step, self._config.seq_length)
        mine = sequences[dist.get_rank() * share : (dist.get_rank() + 1) * share]
        return torch.from_numpy(mine).to(self._device)

    def step(self, sequences: torch.Tensor) -> float:
        """Train on this rank's sequences.

        Args:
            sequences: int64 [b, s + 1]; inputs and, shifted by one, targets.

        Returns:
            Mean loss per token over all ranks, before the update.

        Raises:
            Diverged: on every rank: loss or gradient are not finite. The weights may not be either.
        """
        inputs, targets = sequences[:, :-1], sequences[:, 1:].contiguous()
        positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self._precision():
            loss = self.model(inputs, positions, attention_mask=None, labels=targets).mean()
            loss.backward()
            finalize_model_grads([self.model])
            with cpu.cuda_means_cpu():
                stepped: Any = self.optimizer.step()  # whether, norm of the gradient, zeros in it
        self.schedule.step(1)
        mean_loss = loss.detach().clone()
        dist.all_reduce(mean_loss)
        self._check_finite(mean_loss.item() / dist.get_world_size(), float(stepped[1]))
        return self._last_loss

    def _check_finite(self, loss: float, gradient_norm: float) -> None:
        """Keep the loss if it and the gradient, both the same on all ranks, are numbers."""
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            before = "there was none before"
            if math.isfinite(self._last_loss):
                before = f"the last finite loss is {self._last_loss:.4f}, of step {self._finished - 1}"
            raise Diverged(
                f"training has diverged in step {self._finished}: the loss is {loss:.4f}, the norm of its gradient "
                f"{gradient_norm:.4g}; {before}"
            )
        self._finished, self._last_loss = self._finished + 1, loss

    def balance(self, aux_loss_times: float, bias_rate_times: float) -> None:
        """Balance experts so many times as strongly as the model's configuration says, from the next step on."""
        router, config = self._config.model.router, self.model.config
        config.moe_aux_loss_coeff = router.aux_loss_coeff * aux_loss_times
        if router.bias_update_rate is not None:
            config.moe_router_bias_update_rate = router.bias_update_rate * bias_rate_times

    def close(self) -> None:
        """Take Megatron's process groups down, so that another trainer can follow in the same process."""
        parallel_state.destroy_model_parallel()

    def save(
        self, folder: Path, step: int, placement: ExpertPlacement | None = None, *, keep: int | None = None
    ) -> Path:
        """Write a checkpoint; see `save_checkpoint`."""
        with self._precision():
            return save_checkpoint(folder, step, self.model, self.optimizer, self.schedule, placement, keep=keep)

    def resume(self, folder: Path) -> int:
        """Go on from the newest whole checkpoint of a folder; see `load_latest`.

        Returns:
            Steps that were finished; 0 if there is no checkpoint.
        """
        with self._precision():
            self._finished = load_latest(folder, self.model, self.optimizer, self.schedule)
        return self._finished

    def load(self, checkpoint: Path, placement: ExpertPlacement) -> int:
        """Go on from a checkpoint; see `load_checkpoint`.

        Returns:
            Steps that were finished.
        """
        with self._precision():
            self._finished = load_checkpoint(checkpoint, self.model, self.optimizer, self.schedule, placement)
        return self._finished


def _optimizer_config(config: TrainingConfig) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=config.learning_rate,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        clip_grad=1.0,
        bf16=config.dtype == "bf16",
        params_dtype=PARAMS_DTYPE[config.dtype],
        use_distributed_optimizer=config.distributed_optimizer,
        overlap_param_gather=config.overlap and config.distributed_optimizer,
    )
