"""Starts gloo ranks on this machine and ends all of them when one fails."""

import os
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes


class RankFailedError(RuntimeError):
    """A rank of a multi-process run failed; the message names it."""


def run_ranks(function: Callable[..., None], world_size: int, args: tuple[Any, ...], timeout: timedelta) -> None:
    """Run `function(rank, *args)` on `world_size` new processes that form one gloo group.

    Args:
        function: An importable function.
        world_size: Number of processes.
        args: Further arguments, sent to every process.
        timeout: How long a collective may wait for the slowest rank.

    Raises:
        RankFailedError: A rank raised or died; the others have been ended.
    """
    with tempfile.TemporaryDirectory(prefix="hiermoe-ranks-") as folder:
        rendezvous = (Path(folder) / "rendezvous").as_uri()
        try:
            start_processes(
                _rank_main,
                args=(function, world_size, rendezvous, timeout, args),
                nprocs=world_size,
                start_method="spawn",
            )
        except ProcessRaisedException as error:
            trace = error.msg.strip()
            cause = trace.splitlines()[-1]
            raise RankFailedError(f"rank {error.error_index} of {world_size} failed: {cause}\n{trace}") from None
        except ProcessExitedException as error:
            reason = f"signal {error.signal_name}" if error.signal_name else f"exit code {error.exit_code}"
            raise RankFailedError(f"rank {error.error_index} of {world_size} died by {reason}") from None


def _rank_main(
    rank: int,
    function: Callable[..., None],
    world_size: int,
    rendezvous: str,
    timeout: timedelta,
    args: tuple[Any, ...],
) -> None:
    # All ranks are on this host. gloo otherwise asks the host's name for an address, which need not be reachable.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timeout)
    # Not in a finally: after a failure the process must end at once, for the others to be told.
    function(rank, *args)
    dist.destroy_process_group()


def _loopback_interface() -> str:
    for _, name in socket.if_nameindex():
        if name.startswith("lo"):
            return name
    raise RuntimeError("this host has no loopback interface: set GLOO_SOCKET_IFNAME to one that the ranks can use")
