"""What a placement policy itself costs: its time on this machine, and the bytes that ranks sum for it."""

import time

import pandas as pd

from hiermoe.measure.walk import priced
from hiermoe.measure.workload import Workload
from hiermoe.policies.protocol import StepContext
from hiermoe.ranks.world import Progress, no_progress


def planning_cost(workload: Workload, progress: Progress = no_progress) -> pd.DataFrame:
    """Time the policy of a workload, once a rank and iteration, as in training: each rank measures its own tokens.

    The policy decides from the sum over all ranks, which is not timed; its size is recorded. The first iteration, in
    which tables of the hierarchy are made, is not counted.

    Returns:
        Rows of the phase planning: for every iteration one of the stage measure, with the bytes that are summed, and
        one of the stage decide; of policies that make copies, one of the stage rebalance.
    """
    cluster, placement = workload.cluster, workload.first_places
    step = workload.routing.step(0)
    scheme = priced(workload, 0, placement).scheme
    own_N, pairs_GE = step.source_N == 0, step.pairs_GE
    own_TK, own_T = step.expert_ids_NK[own_N], step.source_N[own_N]
    policy = workload.new_policy()
    summed = policy.measure(step.expert_ids_NK, step.source_N, placement, cluster.hierarchy, 0)
    rows = []
    for iteration in range(workload.iterations):
        sizes = workload.sizes
        context = StepContext(iteration, cluster, scheme, sizes.sent, sizes.expert_parameters, sizes.num_experts)
        started = time.perf_counter()
        measured = policy.measure(own_TK, own_T, placement, cluster.hierarchy, iteration)
        between = time.perf_counter()
        policy.decide(summed, placement, context)
        ended = time.perf_counter()
        if policy.copies is not None:
            policy.rebalance(pairs_GE, placement, context)
        rebalanced = time.perf_counter()
        keys = {
            "phase": "planning",
            "iteration": iteration,
            "routing_iteration": 0,
            "counted": iteration > 0,
            "layer": workload.layer,
            "dimension": scheme.dimension,
        }
        summed_bytes = 0 if measured is None else measured.nbytes
        rows.append(keys | {"stage": "measure", "planning_ms": (between - started) * 1e3, "bytes": summed_bytes})
        rows.append(keys | {"stage": "decide", "planning_ms": (ended - between) * 1e3})
        if policy.copies is not None:
            rows.append(keys | {"stage": "rebalance", "planning_ms": (rebalanced - ended) * 1e3})
        progress(iteration)
    return pd.DataFrame(rows)
