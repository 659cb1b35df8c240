"""One rank's share of training a stock Megatron-Core model with expert parallelism."""

from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from hiermoe.megatron import cpu
from hiermoe.megatron.models import build_model
from hiermoe.megatron.record_config import RecordConfig


class Trainer:
    """Model, optimizer and learning-rate schedule of one rank, on CPU.

    *Collective: every rank of the world must build it and call its methods.*
    """

    def __init__(self, config: RecordConfig, timeout: timedelta) -> None:
        """Set up Megatron's process groups and build everything.

        Args:
            config: The run; the world has `config.ep_size` ranks.
            timeout: Of Megatron's process groups.
        """
        cpu.install()
        parallel_state.initialize_model_parallel(
            expert_model_parallel_size=config.ep_size,
            distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60)),
        )
        torch.manual_seed(config.seed)
        model_parallel_cuda_manual_seed(config.seed)
        with cpu.cuda_means_cpu():
            model = build_model(config.model, seq_length=config.seq_length, ep_size=config.ep_size)
            self.model = DistributedDataParallel(
                model.config, DistributedDataParallelConfig(overlap_grad_reduce=False), model
            )
            self.model.broadcast_params()
            self._optimizer = get_megatron_optimizer(_optimizer_config(config), [self.model])
        self._schedule = OptimizerParamScheduler(
            self._optimizer,
            init_lr=0.0,
            max_lr=config.learning_rate,
            min_lr=config.learning_rate,
            lr_warmup_steps=config.lr_warmup_steps,
            lr_decay_steps=max(config.train_steps + config.record_steps, config.lr_warmup_steps + 1),
            lr_decay_style="constant",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        self._schedule.step(1)  # otherwise the first step's learning rate is 0
        self.model.train()

    def step(self, sequences: torch.Tensor) -> float:
        """Train on this rank's sequences.

        Args:
            sequences: int64 [b, s + 1]; inputs and, shifted by one, targets.

        Returns:
            Mean loss per token over all ranks, before the update.
        """
        inputs, targets = sequences[:, :-1], sequences[:, 1:].contiguous()
        positions = torch.arange(inputs.shape[1]).expand_as(inputs)
        self.model.zero_grad_buffer()
        self._optimizer.zero_grad()
        loss = self.model(inputs, positions, attention_mask=None, labels=targets).mean()
        loss.backward()
        finalize_model_grads([self.model])
        with cpu.cuda_means_cpu():
            self._optimizer.step()
        self._schedule.step(1)
        mean_loss = loss.detach().clone()
        dist.all_reduce(mean_loss)
        return mean_loss.item() / dist.get_world_size()


def _optimizer_config(config: RecordConfig) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=config.learning_rate,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        clip_grad=1.0,
        params_dtype=torch.float32,
        use_distributed_optimizer=False,
    )
