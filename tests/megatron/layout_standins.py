"""What Megatron has for sequence and context parallelism and grouped experts in Transformer Engine alone, in torch.

The dispatchers and the migration of experts meet none of it: they see the tokens that it leaves on a rank, and
parameters by Transformer Engine's names.
"""

import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models import backends
from megatron.core.models.common.embeddings import rotary_pos_embedding
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


def own_part(tokens_BS: torch.Tensor) -> torch.Tensor:
    """What a rank of the context-parallel group has of sequences: a chunk near the start and one near the end."""
    return tokens_BS[:, _places(parallel_state.get_context_parallel_rank(), tokens_BS.shape[1])]


def _places(rank: int, length: int) -> torch.Tensor:
    size = parallel_state.get_context_parallel_world_size()
    chunks = torch.arange(length).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


class _Gathered(torch.autograd.Function):
    """What all ranks of a group have, one after another on the first axis; gradients of all uses come back."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed.chunk(ctx.group.size())[ctx.group.rank()], None


class MarkedNorm:
    """Torch's RMSNorm, whose weight says that every rank has seen other tokens."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_more: Any) -> Any:
        norm = torch.nn.RMSNorm(hidden_size, eps)
        norm.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class GatheredAttention(DotProductAttention):
    """Causal attention of a rank's queries over the keys of the whole context-parallel group."""

    def __init__(self, config: Any, *stock: Any, **more: Any) -> None:
        config = copy.copy(config)
        config.context_parallel_size = 1  # which the stock class insists on
        super().__init__(config, *stock, **more)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_a: Any, **_k: Any) -> torch.Tensor:
        """All [s, b, heads, width]; returns [s, b, heads * width]."""
        group: Any = parallel_state.get_context_parallel_group()
        size, length = group.size(), len(query) * group.size()
        if size > 1:
            key, value = (_Gathered.apply(x, group) for x in (key, value))
        own = _places(group.rank(), length)
        others = torch.cat([_places(rank, length) for rank in range(size)])
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        seen = own[:, None] >= others[None, :]
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=self.softmax_scale)
        return found.permute(2, 0, 1, 3).flatten(2)


class GroupedLinear(torch.nn.Module):
    """Transformer Engine's GroupedLinear by the names of its parameters: weight0, weight1, ..."""

    def __init__(
        self, num_gemms: int, input_size: int, output_size: int, *, config: Any, init_method: Any, pg_collection: Any,
        **_more: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_gemms, self.groups = num_gemms, pg_collection
        tracker: Any = get_cuda_rng_tracker()
        with tracker.fork(get_expert_parallel_rng_tracker_name()):
            for i in range(num_gemms):
                weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
                init_method(weight)
                weight.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]
                weight.tensor_model_parallel = True  # type: ignore[attr-defined] - so every rank's counts in the norm
                self.register_parameter(f"weight{i}", weight)

    def forward(self, rows: torch.Tensor, rows_per_expert: list[int]) -> tuple[torch.Tensor, None]:
        parts = zip(rows.split(rows_per_expert), self.parameters(), strict=True)
        return torch.cat([part @ weight.T for part, weight in parts]), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Every expert's weight as a part of one tensor of all experts, as Transformer Engine's wrapper has it."""
        found = {}
        for i, weight in enumerate(self.parameters()):
            number = self.groups.ep.rank() * self.num_gemms + i
            offsets = (*sharded_offsets, (len(sharded_offsets), number, self.groups.ep.size() * self.num_gemms))
            groups = {"tp_group": self.groups.expt_tp, "dp_cp_group": metadata["dp_cp_group"]}
            one: Any = make_sharded_tensors_for_checkpoint({"weight": weight}, prefix, {}, offsets, **groups)
            (tensor,) = one.values()
            tensor.replica_id = (*tensor.replica_id[:2], self.groups.expt_dp.rank())
            found[f"{prefix}weight{i}"] = tensor
        return found


def install(grouped: bool) -> None:
    """Put them in the place of Megatron's for the whole process, after the suite's own stand-ins.

    Args:
        grouped: whether experts are grouped too.
    """
    backends.DotProductAttention = GatheredAttention  # type: ignore[misc]
    backends.WrappedTorchNorm = MarkedNorm  # type: ignore[misc,assignment]
    backends.LNImpl = gpt_layer_specs.LNImpl = MarkedNorm  # type: ignore[misc,assignment,attr-defined]

    def own_chunks(embeddings: torch.Tensor, axis: int, group: Any) -> torch.Tensor:
        return embeddings.index_select(axis, _places(group.rank(), embeddings.shape[axis]))

    rotary_pos_embedding.get_pos_emb_on_this_cp_rank = own_chunks
    if grouped:
        provider: Any = backends.LocalSpecProvider
        parts: Any = MLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=GroupedLinear)
        stock = provider().grouped_mlp_modules(*[False] * (provider.grouped_mlp_modules.__code__.co_argcount - 1))
        # A class and its parts in 0.16, what builds it later.
        modules = (TEGroupedMLP, parts) if isinstance(stock, tuple) else partial(TEGroupedMLP, submodules=parts)
        provider.grouped_mlp_modules = lambda *_: modules
