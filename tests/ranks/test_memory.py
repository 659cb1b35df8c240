"""Ranks that there is no memory for are refused before the first starts; by default as many start as fit."""

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from hiermoe.ranks import launch, memory
from hiermoe.ranks.launch import run_ranks
from hiermoe.ranks.memory import COPIES, OWN_BYTES, SHARED_BYTES, bytes_of_rank, check_memory, ranks_that_fit
from hiermoe.ranks.server import RankFailedError
from hiermoe.records import free_memory
from hiermoe.records.store import RunStore
from hiermoe.runs.execute import execute
from tests.conftest import Command, Composer

ON_RANKS = ("measure=replay", "ranks=local")


def with_free(monkeypatch: pytest.MonkeyPatch, free: int, cores: int = 64) -> None:
    """A machine of that size."""
    monkeypatch.setattr("hiermoe.ranks.memory.free_bytes", lambda: free)
    monkeypatch.setattr("hiermoe.runs.run_config.total_bytes", lambda: free)
    monkeypatch.setattr("hiermoe.runs.run_config.cores", lambda: cores)


def test_what_a_container_uses_is_not_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(free_memory, "_LIMIT", limit)
    monkeypatch.setattr(free_memory, "_USED", used)
    without = free_memory.total_bytes()
    limit.write_text("max\n")
    assert free_memory.total_bytes() == without
    limit.write_text("1000000\n")
    used.write_text("400000\n")
    assert (free_memory.total_bytes(), free_memory.free_bytes()) == (1_000_000, 600_000)
    used.write_text("2000000\n")
    assert free_memory.free_bytes() == 0


def test_ranks_share_what_they_can() -> None:
    each = bytes_of_rank(1024, 8, 4096)
    assert each == OWN_BYTES + COPIES * 1024 * 8 * 4096
    assert ranks_that_fit(SHARED_BYTES + 3 * each, each) == 3
    assert ranks_that_fit(SHARED_BYTES + 3 * each - 1, each) == 2
    assert ranks_that_fit(0, each) == 0


@pytest.mark.parametrize("free_of", [4, 8, 31])
def test_too_many_ranks_are_refused_before_the_first_starts(
    free_of: int, monkeypatch: pytest.MonkeyPatch, hiermoe: Command
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a rank was started")

    with_free(monkeypatch, SHARED_BYTES + free_of * bytes_of_rank(1024, 8, 4096))
    monkeypatch.setattr("hiermoe.ranks.places.run_ranks", never)
    code, _, err = hiermoe("run", *ON_RANKS, "world_size=32", "routing=uniform", "iterations=2", "wandb.mode=disabled")
    assert code != 0 and len(err.strip().splitlines()) == 1
    assert "32 ranks need" in err and f"are free, for {free_of}: take a smaller world_size=" in err


def test_a_world_that_nobody_measures_the_width_of_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, SHARED_BYTES + 2 * OWN_BYTES)
    check_memory(2, OWN_BYTES, "")
    with pytest.raises(ValueError, match=r"3 ranks need 0\.4 GB of memory"):
        run_ranks(kill_rank_one, 3, (), timedelta(seconds=60))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fit", "cores", "ranks"), [(40, 64, 32), (31, 64, 16), (9, 64, 8), (5, 64, 4), (0, 64, 2), (40, 2, 8)]
)
def test_by_default_as_many_ranks_start_as_fit(
    fit: int, cores: int, ranks: int, monkeypatch: pytest.MonkeyPatch, composed: Composer
) -> None:
    with_free(monkeypatch, SHARED_BYTES + fit * bytes_of_rank(1024, 8, 4096), cores)
    config = composed(*ON_RANKS, "tokens_per_rank=1024")
    assert config.cluster.hierarchy.num_ranks == config.world_size == ranks
    assert composed(*ON_RANKS, "world_size=16").cluster.hierarchy.num_ranks == 16  # as asked for


def test_a_rank_that_the_kernel_killed_for_memory_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RankFailedError, match="rank 1 of 2 died by signal SIGKILL"):
        run_ranks(kill_rank_one, 2, (), timedelta(seconds=60))
    counts = iter(range(100))
    monkeypatch.setattr(launch, "kills_for_memory", lambda: next(counts))
    with pytest.raises(RankFailedError, match="rank 1 of 2 was killed for memory by the kernel: start fewer ranks"):
        run_ranks(kill_rank_one, 2, (), timedelta(seconds=60))


def test_the_kernels_count_is_read() -> None:
    count = memory.kills_for_memory()
    assert count is None or count >= 0


def test_what_a_rank_takes_is_what_doctor_and_refusals_count(composed: Composer, store: RunStore) -> None:
    """Peak memory of real ranks grows with their rows as `bytes_of_rank` says."""
    peaks = {}
    for tokens in (16, 512):
        overrides = ("world_size=2", f"tokens_per_rank={tokens}", "system=hd1", "iterations=4")
        outcome = execute(composed(*ON_RANKS, *overrides), store)
        assert outcome.status == "ok", outcome.reason
        peaks[tokens] = store.read(outcome.run_id)["peak_memory_bytes"].max()
    grown, counted = peaks[512] - peaks[16], bytes_of_rank(512, 8, 4096) - bytes_of_rank(16, 8, 4096)
    assert 0.35 * counted < grown < counted  # a long run takes more than these four iterations


def kill_rank_one(rank: int) -> None:
    """As the kernel does."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
