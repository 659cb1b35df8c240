"""Run configurations and keep their records."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from hiermoe.measure.measurement import by_job
from hiermoe.ranks.world import Progress, World, no_progress
from hiermoe.records.keep import Attempt, Entry, Outcome, kept
from hiermoe.records.status import Status
from hiermoe.records.store import RunStore
from hiermoe.runs.measurable import Measurable


def execute(
    config: Measurable, store: RunStore, progress: Progress = no_progress, world: World | None = None
) -> Outcome:
    """Run one configuration, as :func:`execute_together` does."""
    return execute_together([config], store, progress, world)[0]


def execute_together(
    configs: Sequence[Measurable],
    store: RunStore,
    progress: Progress = no_progress,
    world: World | None = None,
) -> list[Outcome]:
    """Measure what has no record, and store the records. One that turns out not to apply ends no other.

    Args:
        configs: one, or several that differ in their system alone: these are measured interleaved, on the same ranks.
        store: where records are.
        progress: called with the number of every finished iteration.
        world: the ranks, if they are there already.

    Returns:
        The outcomes, in the order of the configurations. A run that does not apply or that failed keeps a row with the
        reason, or the rows that it had.
    """
    done = {config.run_id: kept(config.run_id, store) for config in configs}
    missing = [config for config in configs if done[config.run_id] is None]
    found = {
        outcome.run_id: outcome for outcome in (*done.values(), *_measure(missing, store, progress, world)) if outcome
    }
    return [found[config.run_id] for config in configs]


def refuse(config: Measurable, status: Status, reason: str, store: RunStore) -> Outcome:
    """Record that a run is not even tried."""
    return Attempt(status, reason).keep(_entry(config), store)


def num_steps(config: Measurable) -> int:
    """Of which progress is told; 0 where the run cannot even start."""
    try:
        return config.measurement.num_steps(config.measurement.prepare(config))
    except ValueError:
        return 0


def _measure(
    configs: Sequence[Measurable], store: RunStore, progress: Progress, world: World | None
) -> Iterator[Outcome]:
    """Measure runs that have no record; those without meaning are found before any rank is asked."""
    jobs: list[tuple[Measurable, Any]] = []
    for config in configs:
        attempt = Attempt()
        with attempt:
            jobs.append((config, config.measurement.prepare(config)))
        if attempt.status != "ok":
            yield attempt.keep(_entry(config), store)
    if not jobs:
        return
    first, parts = jobs[0][0], []
    entries = [_entry(config, job) for config, job in jobs]
    attempt = Attempt(share=len(jobs))
    ranks = nullcontext() if first.ranks is None else first.ranks.world(first.cluster, first.ep_groups, world)
    with attempt, ranks as there:
        parts = first.measurement.measure([job for _, job in jobs], there, progress)
    if attempt.status == "not_applicable" and len(jobs) > 1:  # one of them; which one, each finds out alone
        for config, _ in jobs:
            yield from _measure([config], store, progress, world)
        return
    for entry, rows in zip(entries, parts or by_job(attempt.rows, len(jobs)), strict=True):
        yield attempt.keep(entry, store, rows)


def _entry(config: Measurable, job: Any = None) -> Entry:
    told = {} if job is None else config.measurement.provenance(job)
    return Entry(config.run_id, config.content, config.keys, told)
