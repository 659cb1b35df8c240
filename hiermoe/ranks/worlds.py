"""Where ranks come from: new processes on this machine, in an emulated network or not, or those of an allocation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import pandas as pd

from hiermoe.dispatch.communicators import played_hosts
from hiermoe.ranks.emulated.network import EmulatedNetwork
from hiermoe.ranks.streams import run_streaming
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy

Progress = Callable[[int], None]
Source = Literal["local", "emulated", "cluster"]


def no_progress(iteration: int) -> None:
    """Tell nobody."""


class World(Protocol):
    """Ranks that run one function after another, all of them together.

    Attributes:
        source: what records say of numbers that were measured here.
        device: of tensors, cpu or cuda.
    """

    @property
    def source(self) -> Source:
        """What records say of numbers that were measured here."""
        ...

    @property
    def device(self) -> str:
        """Of the tensors that ranks exchange: cpu or cuda."""
        ...

    def run(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        timeout: timedelta,
        progress: Progress = no_progress,
        rows: Path | None = None,
    ) -> pd.DataFrame:
        """Call ``function(rank, *args, folder)`` on all ranks; it makes ``RowStream(folder, rank)`` and writes to it.

        Args:
            function: an importable function.
            args: further arguments.
            timeout: of a collective.
            progress: called with every iteration that rank 0 has finished.
            rows: folder that the ranks' streams are in and stay in; None for a temporary one.

        Returns:
            The rows of all ranks.

        Raises:
            RunDied: a rank failed; has the rows of the iterations before.
            NotApplicable: a rank raised it.
        """
        ...


@dataclass(frozen=True)
class NewRanks:
    """Processes that are started for every function, one for each GPU of a hierarchy.

    Attributes:
        hierarchy: groups of GPUs.
        source: what records say.
        namespaces: network namespace that each GPU's ranks live in; None for this process's own.
        device: of tensors.
        replicas: ranks of each GPU. Hosts are compared inside an expert-parallel group, so replicas may share them.
    """

    hierarchy: Hierarchy
    source: Source = "local"
    namespaces: Sequence[Path] | None = None
    device: str = "cpu"
    replicas: int = 1

    def run(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        timeout: timedelta,
        progress: Progress = no_progress,
        rows: Path | None = None,
    ) -> pd.DataFrame:
        """As every world does."""
        hosts = played_hosts(self.hierarchy) * self.replicas
        namespaces = None if self.namespaces is None else [*self.namespaces] * self.replicas
        return run_streaming(function, len(hosts), args, timeout, hosts, progress, namespaces, rows)


@contextmanager
def world_of(backend: str, cluster: Cluster, replicas: int = 1) -> Iterator[NewRanks]:
    """The ranks of a backend of this machine, for one cluster.

    Args:
        backend: local or emulated.
        cluster: one rank for each of its GPUs,
        replicas: times this.

    Raises:
        ValueError: the network cannot be set up here.
    """
    if backend not in ("local", "emulated"):
        raise ValueError(
            f"backend={backend} starts no ranks here; in an allocation: hiermoe reproduce --backend {backend}"
        )
    if backend == "local":
        yield NewRanks(cluster.hierarchy, replicas=replicas)
        return
    with EmulatedNetwork(cluster) as network:
        yield NewRanks(cluster.hierarchy, "emulated", network.namespace_of_rank, replicas=replicas)
