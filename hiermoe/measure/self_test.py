"""Timings that a calibration would see if the cluster obeyed its own alpha and beta, with noise: a self-test."""

from typing import Any

import numpy as np
import pandas as pd

from hiermoe.measure.measurement import Measurement
from hiermoe.ranks.world import Progress
from hiermoe.topology.cluster import Cluster

SIZES_BYTES = tuple(2**exponent for exponent in range(16, 29))  # 64 KiB to 256 MiB at the busiest GPU
REPEATS = 5
NOISE = 0.01  # standard deviation, relative


class SelfTest(Measurement):
    """Takes a cluster and a seed alone."""

    source = "simulated"
    needs_system = False

    def measure_one(self, job: Any, world: None, progress: Progress) -> pd.DataFrame:
        """At once."""
        return synthetic_timings(job.cluster, job.seed)


def synthetic_timings(cluster: Cluster, seed: int) -> pd.DataFrame:
    """Noisy timings of every AlltoAll of the cluster.

    Args:
        cluster: where alpha and beta come from.
        seed: of the noise.

    Returns:
        Rows of the phase calibration: one per AlltoAll, size and repeat.
    """
    rng = np.random.default_rng(seed)
    rows = [
        {
            "stage": str(exchange),
            "iteration": repeat,
            "bytes": size,
            "predicted_ms": cluster.constants(exchange).ms(size),
        }
        for exchange in cluster.exchanges
        for repeat in range(REPEATS)
        for size in SIZES_BYTES
    ]
    timings = pd.DataFrame(rows).assign(phase="calibration", routing_iteration=-1, counted=True, layer=-1)
    timings["predicted_ms"] *= 1 + NOISE * rng.standard_normal(len(rows))
    return timings
