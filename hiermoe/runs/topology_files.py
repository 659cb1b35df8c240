"""`hiermoe calibrate topology=...`: a cluster's profile from what its nodes say of their links; nothing is measured."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from hiermoe.records.groups import check_is_free
from hiermoe.records.project import CLUSTERS
from hiermoe.records.whole_file import write_whole
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.node_links import read_node_links
from hiermoe.topology.profile_of_links import LinkRates, profile


class TopologyConfig(LinkRates):
    """The schema of conf/calibrate_topology.yaml.

    Attributes:
        topology: file of a node.
        nodes: how many there are.
        name: of the cluster's file.
    """

    topology: str
    nodes: int = Field(ge=1)
    name: str = Field(pattern=r"^[\w.-]+$")

    @model_validator(mode="before")
    @classmethod
    def _is_free(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("name") is None:
            values = {**values, "name": f"{Path(str(values.get('topology'))).stem}_x{values.get('nodes')}"}
        check_is_free(values["name"])
        return values

    @property
    def path(self) -> Path:
        """Where the cluster's file goes."""
        return CLUSTERS / f"{self.name}.yaml"


def write_profile(config: TopologyConfig) -> Cluster:
    """Write the profile to results/clusters/, where ``cluster=<name>`` finds it.

    Raises:
        ValueError: a file that cannot be read so, or a rate that nobody says.
    """
    path = Path(config.topology).expanduser()
    rates = LinkRates(**{name: getattr(config, name) for name in LinkRates.model_fields})
    cluster = profile(read_node_links(path), config.nodes, rates, config.name, path.name)
    body = yaml.safe_dump(cluster.model_dump(mode="json", exclude_none=True), sort_keys=False, width=1000)
    write_whole(
        config.path, f"# Written by `hiermoe calibrate topology=...`: {path.name}. Not measured.\n{body}".encode()
    )
    return cluster
