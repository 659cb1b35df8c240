"""What a configuration that leaves a record says of itself, whichever command it belongs to."""

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from hiermoe.measure.measurement import Measurement
from hiermoe.model import ModelConfig
from hiermoe.policies.system import SystemConfig
from hiermoe.ranks.places import RanksConfig
from hiermoe.records.keep import NONE
from hiermoe.records.run_id import run_id
from hiermoe.topology.cluster import Cluster


class Measurable(Protocol):
    """A run that can be executed and kept."""

    @property
    def measurement(self) -> Measurement:
        """What is measured."""
        ...

    @property
    def ranks(self) -> RanksConfig | None:
        """Where; None where no ranks are needed."""
        ...

    @property
    def cluster(self) -> Cluster:
        """One rank for each GPU of it,"""
        ...

    @property
    def ep_groups(self) -> int:
        """times this."""
        ...

    @property
    def content(self) -> dict[str, Any]:
        """Everything that may change a number, as JSON-ready values."""
        ...

    @property
    def run_id(self) -> str:
        """The name of the run, by its content."""
        ...

    @property
    def keys(self) -> dict[str, Any]:
        """Columns that all rows of the record share."""
        ...


def source_of(config: Measurable) -> str:
    """What the record says of how its numbers came to be."""
    if config.measurement.source is not None:
        return config.measurement.source
    assert config.ranks is not None
    return config.ranks.source


def name_run(
    config: Measurable,
    inputs: tuple[Path, ...] = (),
    host: str | None = None,
    content: Mapping[str, Any] | None = None,
) -> str:
    """The name of a run, by its content, by the code that makes its numbers, and by files that it reads.

    Numbers of one machine are told from another's by its name. The nodes of a cluster are as good as each other.

    Args:
        config: of the run.
        inputs: files that it reads.
        host: the machine; None for this one.
        content: in the place of the configuration's own; None: the latter.
    """
    places = () if config.ranks is None else (type(config.ranks).__module__,)
    host = None if source_of(config) in ("simulated", "cluster") else host or socket.gethostname()
    content = config.content if content is None else dict(content)
    return run_id(content, (config.measurement.module, *places), inputs, host=host)


def keys_of(
    config: Measurable, system: SystemConfig | None = None, model: ModelConfig | None = None, **others: Any
) -> dict[str, Any]:
    """Columns that all rows of a record share; what is not given does not enter."""
    known = {"routing": NONE, "seed": 0, "num_ranks": config.cluster.hierarchy.num_ranks, "tokens_per_rank": 0}
    return (
        known
        | others
        | {
            "source": source_of(config),
            "system": NONE if system is None else system.name,
            "model": NONE if model is None else model.name,
            "cluster": config.cluster.name,
            "num_experts": 0 if model is None else model.num_experts,
            "topk": 0 if model is None else model.topk,
        }
    )
