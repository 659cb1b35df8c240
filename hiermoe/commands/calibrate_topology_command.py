"""A profile from a node's links: print its levels, and write the cluster's file."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hiermoe.records.project import shown
from hiermoe.runs.topology_files import TopologyConfig, write_profile
from hiermoe.topology.cluster import Cluster


def profile_and_print(config: TopologyConfig) -> None:
    """Write the profile, and print what it says and where it is.

    Raises:
        ValueError: the file cannot be read, or lacks a rate.
    """
    cluster = write_profile(config)
    console = Console(soft_wrap=True, highlight=False)
    Console().print(level_table(cluster))
    console.print(f"cluster: {shown(config.path)}, for other commands cluster={config.name}")
    console.print(
        f"not measured: alpha and beta follow from these rates, and real transfers are slower; "
        f"hiermoe calibrate --commands cluster={config.name} says how to measure them"
    )


def level_table(cluster: Cluster) -> Table:
    """Levels and their ports, for the eye."""
    table = Table(title=cluster.description, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("level", no_wrap=True)
    table.add_column("groups", justify="right")
    table.add_column("GB/s of a port", justify="right")
    table.add_column("GPUs share it", justify="right")
    table.add_column("from")
    for level in cluster.levels:
        assert level.port is not None
        port = level.port
        table.add_row(level.name, str(level.groups), f"{port.gb_per_s:g}", str(port.gpus), port.source)
    return table
