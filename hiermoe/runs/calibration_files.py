"""`hiermoe calibrate from=...`: a cluster's constants from what nccl-tests or rccl-tests measured, without our code."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from hiermoe.planner.nccl_exchanges import Exchanged
from hiermoe.records.groups import check_is_free, files_of
from hiermoe.records.project import CLUSTERS
from hiermoe.records.strict import Strict
from hiermoe.records.whole_file import write_whole
from hiermoe.runs.calibration import with_measured_links
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.nccl_tests import ALLTOALL
from hiermoe.topology.peers import WORLD, AlphaBeta, Peers

NOT_MEASURED = "not measured, of the profile: "


class FromFilesConfig(Strict):
    """The schema of conf/calibrate_from.yaml.

    Attributes:
        files: one, several, or by the name of their AlltoAll (``world``, ``inter1``, ...).
        cluster: whose levels the measured GPUs have; what was not measured is taken from it.
        name: of the cluster's file.
        commands: print what measures it, and nothing else.
    """

    files: str | list[str] | dict[str, str | list[str]] | None = Field(alias="from")
    cluster: Cluster
    name: str = Field(pattern=r"^[\w.-]+$")
    commands: bool

    @model_validator(mode="before")
    @classmethod
    def _is_complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("cluster") is None:
            raise ValueError(f"cluster=... is missing: a profile with the same levels; choose from {_profiles()}")
        if values.get("from") is None and not values.get("commands"):
            raise ValueError(f"from=... is missing: files of {ALLTOALL}")
        if values.get("name") is None:
            name = values["cluster"].get("name") if isinstance(values["cluster"], dict) else "cluster"
            values = {**values, "name": f"{name}_nccl_tests"}
        check_is_free(values["name"])
        return values

    @property
    def path(self) -> Path:
        """Where the cluster's file goes."""
        return CLUSTERS / f"{self.name}.yaml"

    def by_exchange(self) -> list[tuple[str | None, Path]]:
        """Every file, with the AlltoAll that it is said to be of."""
        if not isinstance(self.files, dict):
            return [(None, Path(one).expanduser()) for one in _listed(self.files)]
        return [(name, Path(one).expanduser()) for name, some in self.files.items() for one in _listed(some)]


def _listed(files: str | list[str] | None) -> list[str]:
    return [files] if isinstance(files, str) else files or []


def _profiles() -> str:
    return ", ".join(files_of("cluster"))


def write_measured_cluster(config: FromFilesConfig, exchanges: Sequence[Exchanged]) -> Cluster:
    """Write the cluster to results/clusters/, where ``cluster=<name>`` finds it."""
    constants = {one.peers: one.constants for one in exchanges}
    cluster = with_constants(config.cluster, constants).model_copy(update={"name": config.name})
    cluster = with_measured_links(cluster, constants)
    body = yaml.safe_dump(cluster.model_dump(mode="json", exclude_none=True), sort_keys=False, width=1000)
    files = ", ".join(path.name for _, path in config.by_exchange())
    write_whole(config.path, f"# Written by `hiermoe calibrate from=...`: {files}.\n{body}".encode())
    return cluster


def with_constants(cluster: Cluster, measured: Mapping[Peers, AlphaBeta]) -> Cluster:
    """The cluster with these constants, and where there are none its own, marked."""

    def of(peers: Peers) -> AlphaBeta:
        if peers in measured:
            return measured[peers]
        own = cluster.constants(peers)
        return own.model_copy(update={"source": f"{NOT_MEASURED}{own.source}", "published": False})

    levels = [
        level.model_copy(update={kind: of(Peers(kind, number)) for kind in ("inter", "intra")})
        for number, level in enumerate(cluster.levels[:-1], start=1)
    ]
    update = {
        "label": f"{cluster.label}, measured",
        "entrant": False,
        "description": f"{cluster.description}; {', '.join(map(str, measured))} by {ALLTOALL}",
        "world": of(WORLD),
        "levels": (*levels, cluster.levels[-1]),
        "beyond": (),
        "wave_ms": None,  # which nccl-tests do not time
    }
    return cluster.model_copy(update=update)


def commands(cluster: Cluster) -> list[tuple[Peers, str]]:
    """For every AlltoAll of a cluster what measures it, as a command of nccl-tests."""
    hierarchy = cluster.hierarchy
    host = next((at for at, level in enumerate(cluster.levels, 1) if level.name in ("node", "tray")), 1)
    launch = f"mpirun -np {hierarchy.num_ranks} -N {hierarchy.lanes(host)}"
    said = []
    for peers in cluster.exchanges:
        split = _split(peers, cluster)
        variable = f' -x NCCL_TESTS_SPLIT="{split}"' if split else ""
        said.append((peers, f"{launch}{variable} ./build/{ALLTOALL} -b 1K -e 1G -f 2 -g 1 -J {peers}.json"))
    return said


def _split(peers: Peers, cluster: Cluster) -> str:
    """NCCL_TESTS_SPLIT for these peers: ranks of equal colour exchange."""
    hierarchy = cluster.hierarchy
    if peers == WORLD:
        return ""
    if peers.kind == "intra":
        return f"DIV {hierarchy.lanes(peers.level)}"
    lanes, around = hierarchy.lanes(peers.level), hierarchy.lanes(peers.level - 1)
    if peers.level == 1:
        return f"MOD {lanes}"
    if any(count & (count - 1) for count in (lanes, around)):
        raise ValueError(f"{peers} of {cluster.name}: no NCCL_TESTS_SPLIT keeps groups of {around} and {lanes} apart")
    bits = (1 << (hierarchy.num_ranks - 1).bit_length()) - 1
    return f"AND {bits & ~(around - 1) | (lanes - 1):#x}"
