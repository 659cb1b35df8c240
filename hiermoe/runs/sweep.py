"""Runs of sweeps, on all cores, and resumed."""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from hiermoe.ranks.launch import fork_server, preload
from hiermoe.ranks.workers import start_worker
from hiermoe.records.keep import Outcome, kept
from hiermoe.records.store import RunStore
from hiermoe.runs.execute import execute
from hiermoe.runs.run_config import RunConfig


def run_all(
    configs: Iterable[RunConfig],
    workers: int,
    finished: Callable[[Outcome], None],
    store: RunStore | None = None,
) -> list[Outcome]:
    """Run configurations in worker processes, each on one core; those with a record are skipped.

    Runs that share their routing go to the same worker one after another, so that it is made once: each worker is a
    pool of its own, as a pool gives a run to whichever of its processes is free.

    Args:
        configs: what to run; the same run may occur twice and is run once.
        workers: processes.
        finished: called in this process with every outcome.
        store: where records are.

    Returns:
        All outcomes.

    Raises:
        ValueError: a worker was killed.
        Exception: whatever a worker could not turn into a failed record, e.g. a full disk; nothing further is started.
    """
    store = store or RunStore()
    unique = {config.run_id: config for config in configs}
    groups: dict[str, list[RunConfig]] = {}
    outcomes = []
    for run_id, config in unique.items():
        if (outcome := kept(run_id, store)) is not None:
            outcomes.append(outcome)
            finished(outcome)
        else:
            groups.setdefault(config.routing_key, []).append(config)
    if not groups:
        return outcomes
    preload("hiermoe.runs.sweep")
    queue = sorted(groups.values(), key=len, reverse=True)
    pools = [ProcessPoolExecutor(1, fork_server(), start_worker) for _ in range(min(workers, len(queue)))]
    left: dict[ProcessPoolExecutor, list[RunConfig]] = {pool: queue.pop(0) for pool in pools}
    try:
        running = {pool.submit(execute, left[pool].pop(0), store): pool for pool in pools}
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                pool = running.pop(future)
                outcomes.append(future.result())
                finished(outcomes[-1])
                if not left[pool]:
                    left[pool] = queue.pop(0) if queue else _half_of(max(left.values(), key=len))
                if left[pool]:
                    running[pool.submit(execute, left[pool].pop(0), store)] = pool
    except BrokenProcessPool as error:
        raise ValueError(
            f"a simulating process was killed, most likely for want of memory: {workers} of them ran, --workers 1 "
            "takes less. Finished runs are kept"
        ) from error
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
    return outcomes


def _half_of(group: list[RunConfig]) -> list[RunConfig]:
    """Take the second half of what another worker has left."""
    kept = (len(group) + 1) // 2
    taken, group[kept:] = group[kept:], []
    return taken
