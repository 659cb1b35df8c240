"""Where a run may happen: each place says what records call it, and has ranks. One file in conf/ranks/ each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import pandas as pd
import yaml
from pydantic import Field, model_validator

from hiermoe.dispatch.communicators import played_hosts
from hiermoe.ranks.crew import Crew, CrewEnded, leave
from hiermoe.ranks.emulated.network import EmulatedNetwork
from hiermoe.ranks.gpus import check_gpus
from hiermoe.ranks.launch import run_ranks
from hiermoe.ranks.server import RankFailedError
from hiermoe.ranks.streams import collect, streaming
from hiermoe.ranks.world import Device, Progress, Source, World, no_progress
from hiermoe.records.groups import file_of
from hiermoe.records.keep import RunDied
from hiermoe.records.project import SCRATCH
from hiermoe.records.strict import Strict
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy

T = TypeVar("T")


@dataclass(frozen=True)
class NewRanks:
    """Processes of this machine that are started for every function, one for each GPU of a hierarchy.

    Attributes:
        hierarchy: groups of GPUs.
        timeout: of a collective.
        source: what records say.
        namespaces: network namespace that each GPU's ranks live in; None for this process's own.
        device: of tensors.
        ep_groups: ranks of each GPU. Hosts are compared inside an expert-parallel group, so groups may share them.
    """

    hierarchy: Hierarchy
    timeout: timedelta
    source: Source = "local"
    namespaces: Sequence[Path] | None = None
    device: Device = "cpu"
    ep_groups: int = 1

    def run(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        progress: Progress = no_progress,
        rows: Path | None = None,
    ) -> pd.DataFrame:
        """As every world does."""
        hosts = played_hosts(self.hierarchy) * self.ep_groups
        namespaces = None if self.namespaces is None else [*self.namespaces] * self.ep_groups
        with streaming(rows, progress) as folder:
            try:
                where: Any = {"hosts": hosts, "namespaces": namespaces, "device": self.device}
                run_ranks(function, len(hosts), (*args, folder), self.timeout, **where)
            except RankFailedError as error:
                raise RunDied(str(error).splitlines()[0], collect(folder, len(hosts))) from error
            return collect(folder, len(hosts), finished=True)


PLACES: Mapping[str, Source] = {"local": "local", "emulated": "emulated", "allocation": "cluster"}
"""What records say of numbers that were measured in a place."""


class RanksConfig(Strict):
    """Where a run happens, of those that need ranks.

    Attributes:
        name: of the place.
        timeout_s: of a collective, and of finding each other.
        device: of the tensors that ranks exchange: cpu, over gloo, or cuda, over NCCL. Local ranks share the GPUs that
            there are.
    """

    name: Literal["local", "emulated", "allocation"]
    timeout_s: float = Field(gt=0)
    device: Device = "cpu"

    @classmethod
    def named(cls, name: str, device: Device | None = None) -> Self:
        """The place of conf/ranks/<name>.yaml, and the device if it is given."""
        values = yaml.safe_load(file_of("ranks", name).read_text(encoding="utf-8"))
        return cls.model_validate(values if device is None else values | {"device": device})

    @model_validator(mode="after")
    def _check_device(self) -> Self:
        if self.device == "cuda" and self.name == "emulated":
            raise ValueError(
                "device=cuda: ranks=emulated are on the CPU; ranks=local and ranks=allocation may have GPUs"
            )
        return self

    @property
    def source(self) -> Source:
        """What records say of numbers that were measured there."""
        return PLACES[self.name]

    @property
    def on_this_host(self) -> bool:
        """Whether numbers are those of this machine, and not those of a cluster that this process has a part of."""
        return self.source != "cluster"

    @contextmanager
    def world(self, cluster: Cluster, ep_groups: int = 1, joined: World | None = None) -> Iterator[World]:
        """The ranks for a cluster, for as long as the context is entered.

        Args:
            cluster: one rank for each of its GPUs,
            ep_groups: times this.
            joined: ranks that are there already.

        Raises:
            ValueError: the network cannot be set up here, or these ranks must be there already.
        """
        timeout = timedelta(seconds=self.timeout_s)
        if joined is not None:
            yield joined
        elif self.name == "local":
            if self.device == "cuda":
                check_gpus()
            yield NewRanks(cluster.hierarchy, timeout, device=self.device, ep_groups=ep_groups)
        elif self.name == "emulated":
            with EmulatedNetwork(cluster) as network:
                yield NewRanks(cluster.hierarchy, timeout, "emulated", network.namespace_of_rank, ep_groups=ep_groups)
        else:
            raise ValueError("ranks=allocation: this process has not joined the others of its allocation")

    def lead(self, program: Callable[[Crew | None], T], check: Callable[[Crew], None] = lambda crew: None) -> T | None:
        """Run a program that has its ranks measure something. *Collective in an allocation.*

        Does not return where the crew of an allocation ends.

        Args:
            program: is given the processes of the allocation as a crew, None where ranks are started as needed.
            check: called with the crew on every process of the allocation; refuses one that does not fit.

        Returns:
            What the program does; None in processes of an allocation that serve rank 0, which alone runs it.
        """
        if self.on_this_host:
            return program(None)
        crew = Crew.join(self.device, timedelta(seconds=self.timeout_s), SCRATCH)
        check(crew)
        if crew.rank > 0:
            crew.serve()
            return None
        try:
            with crew:
                return program(crew)
        except CrewEnded as error:
            leave(error)
