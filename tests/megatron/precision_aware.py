"""Transformer Engine's FusedAdam by its structure, in torch: what Megatron's precision-aware optimizer needs of it.

The real one needs a GPU. Where state lies, and in which type, is as there: moments and masters by weight in ``state``,
a scale beside whatever is not fp32, and of masters, if asked, only the bits that bf16 weights lack. Which way its last
bit is rounded is not.
"""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class FusedAdam(torch.optim.Optimizer):
    """Steps weights in place, from ``decoupled_grad``."""

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool = True,
        *,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        assert adam_w_mode and master_weights and use_decoupled_grad and not capturable, (
            "as Megatron asks for it with bf16 weights"
        )
        types = (exp_avg_dtype, exp_avg_sq_dtype, master_weight_dtype)
        self.name_to_dtype_map = dict(zip((*MOMENTS, "master_param"), types, strict=True))
        self.store_param_remainders = store_param_remainders
        self._scales: dict[Tensor, dict[str, Tensor]] = {}

    def get_unscaled_state(self, param: Tensor, name: str) -> Tensor:
        """In fp32; of masters maybe the remainders."""
        kept = self.state[param][name]
        return kept if kept.dtype == torch.int16 else kept.float()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """AdamW."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                self._step_one(param, group)

    def _step_one(self, param: Tensor, group: dict[str, Any]) -> None:
        state, remainders = self.state[param], self.store_param_remainders and param.dtype == torch.bfloat16
        if not state:
            for name in MOMENTS:
                state[name] = torch.zeros_like(param, dtype=self.name_to_dtype_map[name])
                if state[name].dtype != torch.float32:
                    self._scales.setdefault(param, {})[name] = torch.ones(1)
            state["master_param"] = torch.zeros_like(param, dtype=torch.int16) if remainders else param.float()
        gradient, (first, second) = param.decoupled_grad.float(), group["betas"]  # type: ignore[attr-defined]
        master = _joined(param, state["master_param"]) if remainders else state["master_param"]
        moments = [state[name].float() for name in MOMENTS]
        moments[0].lerp_(gradient, 1 - first)
        moments[1].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        for name, moment in zip(MOMENTS, moments, strict=True):
            state[name].copy_(moment)
        debiased = (x / (1 - beta ** group["step"]) for x, beta in zip(moments, (first, second), strict=True))
        mean, square = debiased
        update = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * master
        master = master - group["lr"] * update
        if remainders:
            bits = master.view(torch.int32)
            param.copy_((bits >> 16).to(torch.int16).view(torch.bfloat16))
            state["master_param"].copy_((bits & 0xFFFF).to(torch.int16))
        else:
            param.copy_(master)
            state["master_param"].copy_(master)


def _joined(param: Tensor, remainder: Tensor) -> Tensor:
    high, low = param.view(torch.int16).to(torch.int32) << 16, remainder.to(torch.int32) & 0xFFFF
    return (high | low).view(torch.float32)


@contextmanager
def used(**settings: Any) -> Iterator[None]:
    """Trainers that are built inside have Megatron's precision-aware optimizer, with these settings."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer, optimizer_config

    from hiermoe.narrow import trainer

    stock = trainer._optimizer_config

    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers")
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    modules[names[-1]].FusedAdam = FusedAdam

    def precision_aware(config: Any) -> Any:
        # Clipping is of another gradient here than the one that the stand-in for CUDA clips.
        more = {"use_precision_aware_optimizer": True, "clip_grad": 0.0, **settings}
        with patch.dict(sys.modules, modules):  # not beyond: others ask for more of it
            return dataclasses.replace(stock(config), **more)

    with (
        patch.object(optimizer, "Adam", FusedAdam),
        patch.object(distrib_optimizer, "Adam", FusedAdam),
        patch.object(optimizer, "USING_PYTORCH_OPTIMIZER", False),
        patch.object(optimizer, "is_te_min_version", lambda *_: True),
        patch.object(optimizer_config, "is_te_min_version", lambda *_: True),
        patch.object(trainer, "_optimizer_config", precision_aware),
    ):
        yield
