"""Sweeps run each configuration once, skip what is done, and survive what fails."""

import threading
import time

import psutil
import pytest

from hiermoe.records.store import RunStore
from hiermoe.runs.execute import Outcome, execute
from hiermoe.runs.sweep import run_all
from tests.conftest import Composer


@pytest.mark.slow
def test_done_runs_are_skipped_and_failed_ones_tried_again(composed: Composer, store: RunStore) -> None:
    good, bad = composed("system=hd_moe"), composed("system=hd_moe", "routing=topic", "routing.source.num_topics=1000")
    seen: list[Outcome] = []
    first = run_all([good, bad, good], 2, seen.append, store)
    assert sorted(outcome.status for outcome in first) == ["failed", "ok"]
    assert seen == first
    second = run_all([good, bad], 1, seen.append, store)
    assert {outcome.status: outcome.cached for outcome in second} == {"ok": True, "failed": False}


@pytest.mark.slow
def test_workers_give_the_numbers_of_a_single_run(composed: Composer, store: RunStore, tmp_path) -> None:
    configs = [composed("system=hiermoe"), composed("system=hd2_moe_smart_f1")]
    run_all(configs, 2, lambda outcome: None, store)
    alone = RunStore(tmp_path / "alone")
    for config in configs:
        execute(config, alone)
        assert alone.read(config.run_id).equals(store.read(config.run_id))


@pytest.mark.slow
def test_full_disk_ends_the_sweep_with_an_error(composed: Composer, tmp_path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the store wants a folder")
    with pytest.raises(OSError):
        run_all([composed()], 1, lambda outcome: None, RunStore(blocked))


@pytest.mark.slow
def test_a_killed_worker_is_one_clear_message(composed: Composer, store: RunStore) -> None:
    """As when memory runs out: the kernel kills the process that takes most."""
    slow = composed("system=hiermoe", "tokens_per_rank=1024", "iterations=400")

    def kill_worker() -> None:
        """The worker is the one that a server of ours has forked, and takes processor time."""
        for _ in range(600):
            servers = psutil.Process().children()
            busy = [worker for server in servers for worker in server.children() if worker.cpu_times().user > 0.5]
            if busy:
                busy[0].kill()
                return
            time.sleep(0.1)

    killer = threading.Thread(target=kill_worker)
    killer.start()
    with pytest.raises(ValueError, match=r"a simulating process was killed.*--workers 1 takes less"):
        run_all([slow], 1, lambda outcome: None, store)
    killer.join()
