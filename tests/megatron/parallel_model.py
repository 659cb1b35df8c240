"""A small model divided in every way that Megatron knows, trained by its own schedules, in fp64."""

from collections.abc import Iterator
from typing import Any

import torch

HIDDEN, SEQUENCE, VOCABULARY, EXPERTS, TOPK = 32, 16, 64, 8, 2


class ParallelModel:
    """This rank's chunks of a model, and Megatron's optimizer; a step is forwards and backwards of micro-batches.

    Attributes:
        chunks: of the model, one for each virtual stage of this rank.
        optimizer: of all chunks.
        schedule: of its learning rate, which is constant.
        precision: context in which what Megatron wants in fp32 is fp64.
    """

    def __init__(
        self,
        has_experts: list[int],
        stages: int = 2,
        virtual: int | None = None,
        ep_size: int = 1,
        recompute: bool = False,
        tensor: int = 1,
        context: int = 1,
        distributed: bool = False,
        grouped: bool = False,
        predicted: int = 0,
        shared: bool = False,
    ) -> None:
        """Set Megatron up. *Collective.*

        Args:
            has_experts: for each layer 1, or 0 where it is dense.
            stages: of the pipeline.
            virtual: chunks of each, None for one.
            ep_size: ranks that share the experts of a layer.
            recompute: whether backward computes whole layers again.
            tensor: ranks that divide attention, and outside of it sequences.
            context: ranks that divide sequences everywhere.
            distributed: whether replicas divide the optimizer's state.
            grouped: whether experts are TEGroupedMLP's.
            predicted: layers of multi-token prediction, behind the last stage's.
            shared: whether layers with experts have a shared one too.
        """
        from hiermoe.megatron.standins import cpu, without_te

        cpu.expect_fallbacks()
        cpu.install()
        without_te.install()
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer.transformer_config import TransformerConfig

        from hiermoe.narrow.models import NO_FUSIONS
        from hiermoe.narrow.precision import float32_means_float64, make_float64
        from tests.megatron import layout_standins

        layout_standins.install(grouped)
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            context_parallel_size=context,
            expert_tensor_parallel_size=1,
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=virtual,
            expert_model_parallel_size=ep_size,
        )
        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1)
        recomputed: dict[str, Any] = {}
        if recompute:
            recomputed = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        config = TransformerConfig(
            **NO_FUSIONS,
            **recomputed,
            num_layers=len(has_experts),
            hidden_size=HIDDEN,
            ffn_hidden_size=HIDDEN,
            num_attention_heads=2,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            normalization="RMSNorm",
            add_bias_linear=False,
            num_moe_experts=EXPERTS,
            moe_router_topk=TOPK,
            moe_ffn_hidden_size=HIDDEN // 2,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            moe_layer_freq=has_experts,
            moe_shared_expert_intermediate_size=HIDDEN // 2 if shared else None,
            mtp_num_layers=predicted or None,
            moe_router_dtype="fp64",
            moe_token_dispatcher_type="alltoall",
            expert_model_parallel_size=ep_size,
            expert_tensor_parallel_size=1,
            tensor_model_parallel_size=tensor,
            sequence_parallel=tensor > 1,
            context_parallel_size=context,
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=virtual,
            params_dtype=torch.float64,
            pipeline_dtype=torch.float64,
            attention_softmax_in_fp32=False,
            finalize_model_grads_func=finalize_model_grads,
        )
        self.precision = float32_means_float64
        self.chunks: list[torch.nn.Module] = []
        for stage in range(virtual or 1):
            of: Any = {} if virtual is None else {"vp_stage": stage}
            spec: Any = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", **of)
            is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=virtual is None, **of)
            further: Any = None
            if predicted and is_last:
                further = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, **of)
            with cpu.cuda_means_cpu(), self.precision():
                chunk = GPTModel(
                    config=config,
                    transformer_layer_spec=spec,
                    vocab_size=VOCABULARY,
                    max_sequence_length=SEQUENCE,
                    position_embedding_type="rope",
                    share_embeddings_and_output_weights=False,
                    pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=virtual is None, **of),
                    post_process=is_last,
                    mtp_block_spec=further,
                    **of,
                )
                make_float64(chunk)
                settings = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
                self.chunks.append(DistributedDataParallel(config, settings, chunk).train())
        with cpu.cuda_means_cpu(), self.precision():
            of_optimizer = OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                weight_decay=0.1,
                params_dtype=torch.float64,
                use_distributed_optimizer=distributed,
            )
            self.optimizer = get_megatron_optimizer(of_optimizer, self.chunks)  # type: ignore[arg-type]
        self.schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=1e-2,
            min_lr=1e-2,
            lr_warmup_steps=0,
            lr_decay_steps=1,
            lr_decay_style="constant",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        self.schedule.step(1)

    def step(self, tokens_NBS: torch.Tensor) -> list[float]:
        """Train on N micro-batches of B sequences.

        Returns:
            Losses of the micro-batches on the last stage, nothing on others.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from hiermoe.megatron.standins import cpu
        from tests.megatron import layout_standins

        def forward(batches: Iterator[torch.Tensor], model: torch.nn.Module) -> Any:
            tokens_BS = layout_standins.own_part(next(batches))
            positions = layout_standins.own_part(torch.arange(SEQUENCE)[None]).expand_as(tokens_BS)
            with self.precision():
                loss = model(tokens_BS, positions, attention_mask=None, labels=tokens_BS)
            return loss, lambda loss: (loss.mean(), {"loss": loss.detach().mean()})

        batches = [iter(tokens_NBS) for _ in self.chunks]
        for chunk in self.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        with cpu.cuda_means_cpu(), self.precision():
            losses = get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=batches if len(batches) > 1 else batches[0],
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=len(tokens_NBS),
                seq_length=SEQUENCE,
                micro_batch_size=tokens_NBS.shape[1],
                forward_only=False,
            )
            self.optimizer.step()
        self.schedule.step(1)
        return [float(of["loss"]) for of in losses]
