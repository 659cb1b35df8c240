"""The first rank that fails ends the run, and the error names it."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from hiermoe.megatron.launcher import RankFailedError, run_ranks

TIMEOUT = timedelta(seconds=60)


def sum_of_ranks(rank: int, path: str) -> None:
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    if rank == 0:
        torch.save(total, path)


def raise_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("no room for token 7")
    dist.barrier()


def die_on_rank_one(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(TIMEOUT.total_seconds())


def test_ranks_form_one_group(tmp_path) -> None:
    path = tmp_path / "total.pt"
    run_ranks(sum_of_ranks, 2, (str(path),), TIMEOUT)
    assert torch.load(path).item() == 3


def test_a_rank_that_raises_ends_the_run_and_is_named() -> None:
    with pytest.raises(RankFailedError) as caught:
        run_ranks(raise_on_rank_one, 2, (), TIMEOUT)
    first_line = str(caught.value).splitlines()[0]
    assert first_line == "rank 1 of 2 failed: ValueError: no room for token 7"


def test_a_rank_that_dies_ends_the_run_and_is_named() -> None:
    started = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 1 of 2 died by signal SIGKILL"):
        run_ranks(die_on_rank_one, 2, (), TIMEOUT)
    assert time.monotonic() - started < TIMEOUT.total_seconds()
