"""A cluster's profile from the links of one of its nodes: levels, and through which port traffic leaves each group."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from hiermoe.records.strict import Strict, checked
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.node_links import KINDS, NodeLinks

# Of a message, as NCCL plans with (src/graph/tuning.cc).
_NVLINK_US, _PCIE_US, _NETWORK_US = 3.4, 5.7, 14.0
_NCCL = "latency: NCCL src/graph/tuning.cc"
_NVLINKS_OF: Sequence[tuple[int, float]] = ((100, 50.0), (70, 25.0), (0, 20.0))
"""Compute capability from which on, and GB/s of one NVLink each way: data sheets of B200; H100, A100 and V100; P100."""
_GROUPS = {"NV": "nvlink_group", "PIX": "switch", "PXB": "switch", "PHB": "bridge", "NODE": "socket"}


class LinkRates(Strict):
    """What no file tells, or a file is to be corrected in.

    Attributes:
        network_gbit_per_s: of one network card.
        nics: cards that a node's traffic takes.
        nvlink_gb_per_s: of one NVLink, each way.
        pcie_gb_per_s: of a GPU's PCIe link, each way.
        socket_gb_per_s: between two sockets, each way.
    """

    network_gbit_per_s: float | None = Field(default=None, gt=0)
    nics: int | None = Field(default=None, ge=1)
    nvlink_gb_per_s: float | None = Field(default=None, gt=0)
    pcie_gb_per_s: float | None = Field(default=None, gt=0)
    socket_gb_per_s: float | None = Field(default=None, gt=0)


@dataclass(frozen=True)
class _Groups:
    name: str
    count: int
    port: dict[str, object]


def profile(links: NodeLinks, nodes: int, rates: LinkRates, name: str, origin: str) -> Cluster:
    """The cluster of so many nodes with these links.

    Groups are GPUs that reach each other over nearer links than others. What nobody measured is said in each port's
    source; alpha and beta are derived from the ports (:mod:`hiermoe.topology.data_sheet`).

    Args:
        links: of one node.
        nodes: how many there are, all alike.
        rates: what the file does not tell.
        name: of the cluster.
        origin: what the links were read from.

    Raises:
        ValueError: a rate that neither says, groups of unequal size, or GPUs of a group that are not neighbours.
    """
    found = _network(links, nodes, rates, origin)
    narrowest = {len(groups): (kind, groups) for kind in reversed(KINDS[:-1]) for groups in [links.joined(kind)]}
    for count, (kind, groups) in sorted(narrowest.items()):
        if 1 < count < links.num_gpus:
            _check(groups, kind, origin)
            out = KINDS[links.leaving(groups)]
            name_of = "socket" if out == "SYS" else _GROUPS[kind]
            port = _port(out, kind, len(groups[0]), links, rates, origin)
            found.append(_Groups(name_of, count * nodes, port))
    single = [(gpu,) for gpu in range(links.num_gpus)]
    out = KINDS[links.leaving(single)]
    found.append(_Groups("gpu", links.num_gpus * nodes, _port(out, "", 1, links, rates, origin)))
    names = [one.name for one in found]
    levels = [
        {
            "name": one.name if names.count(one.name) == 1 else f"{one.name}_{one.count}",
            "groups": one.count,
            "port": one.port,
        }
        for one in found
    ]
    levels[-1]["label"] = "GPUs"
    said = f"{nodes} x {links.num_gpus} GPUs, links as {origin} has them"
    return checked({"name": name, "label": name, "description": said, "levels": levels}, Cluster, origin)


def _network(links: NodeLinks, nodes: int, rates: LinkRates, origin: str) -> list[_Groups]:
    """The level of nodes; none of a single one."""
    if nodes == 1:
        return []
    gbit = rates.network_gbit_per_s or links.nic_gbit_per_s
    cards = rates.nics or len(links.nics)
    if not cards:
        raise ValueError(f"{origin} lists no network cards; say nics= of a node")
    if gbit is None:
        raise ValueError(f"{origin} has no rate of its network cards; say network_gbit_per_s= of one")
    if max(cards, links.num_gpus) % min(cards, links.num_gpus):
        raise ValueError(
            f"nics={cards} and {links.num_gpus} GPUs of a node do not divide; say nics= that carry the traffic"
        )
    each = max(1, cards // links.num_gpus)
    source = f"{origin}: {cards} network cards nearest to {links.num_gpus} GPUs, {gbit:g} Gb/s each"
    port = _stated(gbit / 8 * each, max(1, links.num_gpus // cards), _NETWORK_US, f"{source}; {_NCCL}, network")
    return [_Groups("node", nodes, port)]


def _port(out: str, inside: str, gpus: int, links: NodeLinks, rates: LinkRates, origin: str) -> dict[str, object]:
    """How traffic leaves a group: over its GPUs' own NVLinks or PCIe links, or over what they share."""
    if out == "NV":
        each = rates.nvlink_gb_per_s or _nvlink_gb_per_s(links, origin)
        return _stated(
            links.nvlinks * each, 1, _NVLINK_US, f"{origin}: {links.nvlinks} NVLinks of {each:g} GB/s; {_NCCL}, NVLink"
        )
    if out == "SYS" and gpus > 1:
        if rates.socket_gb_per_s is None:
            raise ValueError(
                f"{origin} has no rate between sockets; say socket_gb_per_s= (each way, all links together)"
            )
        return _stated(rates.socket_gb_per_s, gpus, _PCIE_US, f"stated: between sockets; {_NCCL}, PCIe")
    rate = rates.pcie_gb_per_s or links.pcie_gb_per_s
    if rate is None:
        raise ValueError(f"{origin} has no rate of PCIe; say pcie_gb_per_s= of a GPU (4.0 x16: 31.5, 5.0 x16: 63)")
    shared = gpus if inside in ("PIX", "PXB") else 1
    how = "one link up from a switch, assumed as fast as a GPU's" if shared > 1 else "a link for each GPU"
    return _stated(rate, shared, _PCIE_US, f"{origin}: PCIe, {how}; {_NCCL}, PCIe")


def _nvlink_gb_per_s(links: NodeLinks, origin: str) -> float:
    if links.compute_capability is None:
        raise ValueError(
            f"{origin} does not say which NVLinks; say nvlink_gb_per_s= of one, each way (A100, H100: 25; B200: 50)"
        )
    return next(rate for least, rate in _NVLINKS_OF if links.compute_capability >= least)


def _stated(gb_per_s: float, gpus: int, latency_us: float, source: str) -> dict[str, object]:
    return {"gb_per_s": round(gb_per_s, 3), "gpus": gpus, "latency_us": latency_us, "source": source}


def _check(groups: Sequence[tuple[int, ...]], kind: str, origin: str) -> None:
    sizes = sorted({len(group) for group in groups})
    if len(sizes) > 1:
        raise ValueError(f"{origin}: GPUs within {kind} of each other are groups of {sizes}; a level needs equal ones")
    order = [gpu for group in groups for gpu in group]
    if order != sorted(order):
        line = ",".join(map(str, order))
        raise ValueError(
            f"{origin}: {groups[0]} belong together; number GPUs so: CUDA_VISIBLE_DEVICES={line}, and print it anew"
        )
