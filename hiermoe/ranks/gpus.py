"""GPUs of this machine for ranks that are started on it, of which several may share one."""

import os
import warnings

import torch
import torch.distributed as dist

from hiermoe.ranks.world import Device
from hiermoe.records.provenance import nccl_version

_SHARES_A_GPU = (2, 30, 0)  # the first NCCL that takes ranks of one host on the same GPU, where it is asked to


def check_gpus() -> None:
    """Refuse where ranks could not be on GPUs.

    Raises:
        ValueError: torch sees none here, or has no NCCL.
    """
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise ValueError(f"ranks.device=cuda: torch {torch.__version__}, built {built}, sees no GPU here")
    if nccl_version() is None:
        raise ValueError(f"ranks.device=cuda: torch {torch.__version__} was built without NCCL")


def use_gpu(index: int) -> None:
    """Make one of this machine's GPUs this process's own, before it joins the others over NCCL."""
    torch.cuda.set_device(index)
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")


def meet(device: Device) -> None:
    """Wait for all ranks of the world, by a first collective on the device that is theirs. *Collective.*

    NCCL connects in it; a barrier as the first one would guess each rank's GPU by its number.
    """
    dist.all_reduce(torch.zeros(1, device=device))
    if device == "cuda":
        torch.cuda.synchronize()


def take_gpu(rank: int, num_ranks: int, host: str) -> None:
    """`use_gpu` for a rank of several on this machine, of which there may be more than GPUs.

    Ranks that share a GPU take turns on it, so what they do is right and how long it takes means little. NCCL is told
    of the hosts that ranks play: between two of them it uses sockets, within one shared memory. An NCCL that takes no
    two ranks of a host on one GPU is told that every rank is a host of its own.

    Args:
        rank: of this process; ranks take GPUs in turn.
        num_ranks: on this machine.
        host: that this rank plays.
    """
    num_gpus = torch.cuda.device_count()
    use_gpu(rank % num_gpus)
    if num_ranks <= num_gpus:
        return
    version = nccl_version()
    shares = version is not None and version >= _SHARES_A_GPU
    defaults = {
        "NCCL_HOSTID": host if shares else f"{host}-rank{rank}",
        "NCCL_MULTI_RANK_GPU_ENABLE": "1",
        "NCCL_NVLS_ENABLE": "0",
        "NCCL_MAX_CTAS": "2",  # of one collective, so that those of all ranks fit on the GPU together
        "NCCL_SOCKET_IFNAME": "lo",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
