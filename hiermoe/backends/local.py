"""Real dispatchers on this machine: gloo ranks over its loopback, which has no hierarchy of its own."""

import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import pandas as pd

from hiermoe.backends.replay import ReplayJob, replay
from hiermoe.backends.streams import run_streaming
from hiermoe.backends.workload import Workload
from hiermoe.dispatch.communicators import played_hosts
from hiermoe.routing.step import first_measured, iteration_schedule


def run_local(
    workload: Workload,
    timeout: timedelta,
    progress: Callable[[int], None] = lambda iteration: None,
    namespaces: Sequence[Path] | None = None,
) -> pd.DataFrame:
    """Replay all iterations of one layer on one process for every GPU of the cluster.

    Args:
        workload: what to run.
        timeout: of a collective.
        progress: called with the number of every finished iteration.
        namespaces: network namespace that each rank lives in; None for this process's own.

    Returns:
        Rows of the phases dispatch, combine, their backward, and step, of every rank, without the run's own keys.

    Raises:
        ValueError: results would not be exact in this dtype.
        RunDied: a rank failed.
    """
    hierarchy, routing = workload.cluster.hierarchy, workload.routing
    schedule = iteration_schedule(workload.iterations, routing.num_distinct)
    measured_from = first_measured(workload.iterations, routing.num_distinct)
    with tempfile.TemporaryDirectory(prefix="hiermoe-replay-") as folder:
        job = ReplayJob(
            system=workload.system,
            cluster=workload.cluster,
            num_experts=workload.num_experts,
            topk=workload.topk,
            hidden_size=workload.row_bytes // workload.element_bytes,
            element_bytes=workload.element_bytes,
            expert_parameters=workload.expert_parameters,
            layer=workload.layer,
            measured=tuple(iteration >= measured_from for iteration in range(workload.iterations)),
            routing_iterations=tuple(schedule),
            routing=Path(folder),
            timeout=timeout,
        )
        job.check()
        for iteration in sorted(set(schedule)):
            job.save(iteration, routing.step(iteration))
        hosts = played_hosts(hierarchy)
        return run_streaming(replay, hierarchy.num_ranks, (job,), timeout, hosts, progress, namespaces)
