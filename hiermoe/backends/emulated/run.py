"""The replay of backend=local with every rank in the emulated network, where links are as slow as the cluster says."""

from collections.abc import Callable
from datetime import timedelta

import pandas as pd

from hiermoe.backends.emulated.network import EmulatedNetwork
from hiermoe.backends.local import run_local
from hiermoe.backends.workload import Workload


def run_emulated(
    workload: Workload, timeout: timedelta, progress: Callable[[int], None] = lambda iteration: None
) -> pd.DataFrame:
    """Set the network up, replay all iterations of one layer in it, and take it down.

    Args:
        workload: what to run.
        timeout: of a collective.
        progress: called with the number of every finished iteration.

    Returns:
        As `run_local` does.

    Raises:
        ValueError: the network cannot be set up here, or results would not be exact in this dtype.
        RunDied: a rank failed.
    """
    with EmulatedNetwork(workload.cluster) as network:
        return run_local(workload, timeout, progress, network.namespace_of_rank)
