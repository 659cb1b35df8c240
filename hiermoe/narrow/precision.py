"""The types that a model is trained in, and what keeps a float64 run in float64."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch.overrides import TorchFunctionMode

PARAMS_DTYPE = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
"""Type of weights and activations under each `TrainingConfig.dtype`."""


@contextmanager
def float32_means_float64() -> Iterator[None]:
    """Serve every explicit wish for float32 with float64.

    Megatron computes some things in float32 whatever the model's type: the router's softmax, the expert bias, the loss,
    the norm of the gradients. Meant as more precision than bf16's, it is less than float64's, and its rounding would
    turn two runs that differ by 1e-16 into runs that differ by 1e-7.
    """
    with _Float32MeansFloat64():
        yield


def make_float64(model: torch.nn.Module) -> None:
    """Turn a model that was built as float64 into one that is float64 throughout, in recomputation too.

    Torch makes the norms in its default type. And in backward torch switches modes such as the above off, so the
    routers, which activation recomputation runs there, bring it along.
    """
    model.double()
    for router in model.modules():
        if isinstance(router, TopKRouter):
            router.forward = float32_means_float64()(router.forward)  # type: ignore[method-assign]


class _Float32MeansFloat64(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        elif func is torch.Tensor.to:
            args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        return func(*args, **kwargs)
