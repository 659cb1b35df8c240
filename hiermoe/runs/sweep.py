"""Runs of sweeps, on all cores, and resumed."""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

from hiermoe.ranks.server import preload
from hiermoe.ranks.workers import worker_pools
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
        ServerGone: the process that workers come from was.
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
    with worker_pools(min(workers, len(queue)), 1, "; --workers 1 takes less. Finished runs are kept") as pools:
        left: dict[ProcessPoolExecutor, list[RunConfig]] = {pool: queue.pop(0) for pool in pools}
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
    return outcomes


def _half_of(group: list[RunConfig]) -> list[RunConfig]:
    """Take the second half of what another worker has left."""
    kept = (len(group) + 1) // 2
    taken, group[kept:] = group[kept:], []
    return taken
