"""Stand-ins that let stock Megatron-Core run on CPU with gloo. Imported only where a run asks for device=cpu.

Megatron-Core assumes CUDA in a dozen places. All of them are met here, each with the reason, for the version named in
`TESTED_VERSION`. `install()` changes torch and Megatron for the whole process, so a process that has a GPU to use must
never call it; constructors and the optimizer step also need the context manager `cuda_means_cpu()`.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch._dynamo
from torch.overrides import TorchFunctionMode

from hiermoe.megatron.standins import without_te

TESTED_VERSION = "0.16.1"

_CPU = torch.device("cpu")
_installed = False


class _NoStream:
    """A CUDA stream on a machine without CUDA: work is already in order, so waiting is a no-op."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def wait_stream(self, _other: object) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self) -> "_NoStream":
        """An event that has already happened; like a stream, it can be waited for."""
        return self


_THE_STREAM = _NoStream()


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects device='cuda' of factory functions and `.cuda()` to the CPU, and calls tensors by their CUDA types.

    The latter is how optimizers tell parameters that need a master copy from others; float64 ones need none, like fp32.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        device = kwargs.get("device")
        if isinstance(device, str) and device.startswith("cuda"):
            kwargs = {**kwargs, "device": _CPU}
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1).replace("Double", "Float")
        return result


@contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """Reads device='cuda' as CPU inside: for building model and optimizer and for the optimizer's step.

    Kept away from forward and backward, where it would slow every torch call and no such literal is met. Changes
    nothing in a process without the stand-ins, which has a GPU.
    """
    with _CudaMeansCpu() if _installed else nullcontext():
        yield


def expect_fallbacks() -> None:
    """Silence what Megatron warns of when Transformer Engine and Apex are missing. Call before importing it.

    Torch's own norms, optimizers and attention are what a run on CPU asks for. What torch says, on every rank, of calls
    of Megatron's that it will not have for ever helps no reader.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    for said in (r".*all_gather_into_tensor. is deprecated", "Please use DTensor", "`load_state_dict` is deprecated"):
        warnings.filterwarnings("ignore", category=FutureWarning, message=said)


def install() -> None:
    """Install every process-wide stand-in. Safe to call again.

    Raises:
        RuntimeError: This process has used a GPU, whose work the stand-ins would break.
    """
    global _installed
    if _installed:
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that nothing in this process finds a GPU
    if torch.cuda.is_available():
        raise RuntimeError("device=cpu in a process that has used a GPU already: start it with CUDA_VISIBLE_DEVICES=''")
    without_te.install()
    _stand_in_for_cuda()
    _stand_in_for_rng()
    _stand_in_for_moe()
    _stand_in_for_clipping()
    _installed = True


def _stand_in_for_cuda() -> None:
    # Streams are created and waited for unconditionally by the token dispatchers and by DistributedDataParallel.
    torch.cuda.Stream = _NoStream  # type: ignore[misc,assignment]
    torch.cuda.current_stream = lambda *_a, **_k: _THE_STREAM  # type: ignore[assignment]
    torch.cuda.stream = lambda *_a, **_k: nullcontext()  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_a, **_k: None  # type: ignore[assignment]
    # Only ever used as `device=torch.cuda.current_device()`.
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    # Megatron decorates small functions with torch.compile: on CPU that means minutes of C++ compilation for nothing.
    torch._dynamo.config.disable = True  # type: ignore[attr-defined]


def _stand_in_for_rng() -> None:
    from megatron.core.tensor_parallel import random

    # The RNG tracker forks and restores the CUDA generator; without one it must act on the CPU generator.
    def get_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state = get_state  # type: ignore[assignment]
    random._set_cuda_rng_state = set_state  # type: ignore[assignment]
    # Its warning that the CPU generator moved inside a fork is about the one generator that there is.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    torch.cuda.get_rng_state = get_state  # type: ignore[assignment]
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]


def _stand_in_for_moe() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    # On a GPU this gives numpy splits; a tensor that is on the CPU already stays a tensor, and gloo wants integers.
    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host  # type: ignore[assignment]


def _stand_in_for_clipping() -> None:
    from megatron.core.optimizer import optimizer

    # The stock function asserts that every gradient is a torch.cuda.FloatTensor.
    def clip(parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False) -> None:
        coefficient = max_norm / (total_norm + 1.0e-6)
        if coefficient < 1.0:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(coefficient)

    optimizer.clip_grad_by_total_norm_fp32 = clip  # type: ignore[assignment]
