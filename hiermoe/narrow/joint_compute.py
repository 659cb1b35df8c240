"""Computes what stock Megatron-Core computes one after the other on a CPU, together: the experts, and the vocabulary.

On a GPU stock Megatron has grouped GEMMs and fused losses for that. Parameters, their names, checkpoints, routers and
dispatchers stay what they are; the same numbers come out, but for the order in which they are added.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.experts import SequentialMLP

_TOKENS_AT_ONCE = 256  # of scores: [16384, 256] float32 are 16 MiB, which stay in the cache


def compute_jointly(model: GPTModel) -> None:
    """Let the experts of every layer, and output layer with loss, be computed together in training.

    Args:
        model: A stock model with `SequentialMLP` experts (SwiGLU, no biases), no tensor parallelism.
    """
    for module in model.modules():
        if isinstance(module, SequentialMLP):
            module.forward = _Experts(module)  # type: ignore[method-assign]
    model.output_layer.forward = lambda hidden, **_: (hidden, None)  # type: ignore[method-assign]  # pyright: ignore
    model.compute_language_model_loss = _ChunkedLoss(model.output_layer.weight)  # type: ignore[method-assign]


class _Experts:
    """`SequentialMLP.forward` with one grouped matrix product for each of its two."""

    def __init__(self, experts: SequentialMLP) -> None:
        self._experts = experts

    def __call__(
        self, tokens_NH: torch.Tensor, tokens_per_expert: torch.Tensor, probs_N: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        local: Any = self._experts.local_experts
        ends = tokens_per_expert.cumsum(0).to(torch.int32)
        up_EHF = torch.stack([expert.linear_fc1.weight for expert in local]).transpose(1, 2)
        down_EFH = torch.stack([expert.linear_fc2.weight for expert in local]).transpose(1, 2)
        gate_NF, linear_NF = F.grouped_mm(tokens_NH, up_EHF, offs=ends).chunk(2, dim=-1)
        hidden_NF = F.silu(gate_NF) * linear_NF * probs_N.unsqueeze(-1)
        return F.grouped_mm(hidden_NF, down_EFH, offs=ends), None


class _ChunkedLoss:
    """`GPTModel.compute_language_model_loss`, given hidden states: no logits of all tokens are ever held."""

    def __init__(self, weight_VH: torch.Tensor) -> None:
        self._weight_VH = weight_VH

    def __call__(self, labels_BS: torch.Tensor, hidden_SBH: torch.Tensor) -> torch.Tensor:
        losses_N = _Loss.apply(hidden_SBH.flatten(0, 1), self._weight_VH, labels_BS.transpose(0, 1).flatten())
        return losses_N.view(hidden_SBH.shape[:2]).transpose(0, 1)


class _Loss(torch.autograd.Function):
    """Cross-entropy of every token. Its gradients are computed in forward, for the mean over tokens."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        hidden_grad_NH, weight_grad_VH = torch.empty_like(hidden_NH), torch.zeros_like(weight_VH)
        losses_N = hidden_NH.new_empty(len(hidden_NH))
        all_scores = hidden_NH.new_empty(len(weight_VH) * _TOKENS_AT_ONCE)  # one memory for all: new pages are dear
        for start in range(0, len(hidden_NH), _TOKENS_AT_ONCE):
            some = slice(start, start + _TOKENS_AT_ONCE)
            hidden, labels = hidden_NH[some], labels_N[some].unsqueeze(0)
            scores_VN = all_scores[: len(weight_VH) * len(hidden)].view(len(weight_VH), -1)
            torch.mm(weight_VH, hidden.T, out=scores_VN)  # this way round, all three products are fast
            scores_VN -= scores_VN.amax(0)
            losses = -scores_VN.gather(0, labels)
            total = scores_VN.exp_().sum(0)
            losses_N[some] = losses[0] + total.log()
            # Gradients are [probability - 1 for the label] = scores / total, which is divided by where there is less.
            scores_VN.scatter_add_(0, labels, -total.unsqueeze(0))
            torch.mm(scores_VN.T, weight_VH, out=hidden_grad_NH[some])
            hidden_grad_NH[some] /= total.unsqueeze(1)
            weight_grad_VH.addmm_(scores_VN, hidden / total.unsqueeze(1))
        ctx.save_for_backward(hidden_grad_NH, weight_grad_VH)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden_grad_NH, weight_grad_VH = ctx.saved_tensors
        scale = gradients[0][0]
        if not bool((gradients[0] == scale).all()):
            raise ValueError("the loss is the mean over tokens: no token may count more than another")
        return hidden_grad_NH * scale, weight_grad_VH * scale, None
