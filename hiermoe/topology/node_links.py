"""What a node's own tools say of the links between its GPUs: ``nvidia-smi topo -m``, and NCCL's topology XML.

The matrix names what lies between every two devices, and no rate. The XML (``NCCL_TOPO_DUMP_FILE``) is a tree of PCI
devices with the rates of PCIe links and network cards, and with the NVLinks of each GPU. Both become the same matrix.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

KINDS = ("NV", "PIX", "PXB", "PHB", "NODE", "SYS")
"""What lies between two devices, nearest first: NVLinks, one PCIe switch, several, a host bridge, several of a socket,
the link between sockets."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CELL = re.compile(r"X|NV\d+|PIX|PXB|PHB|NODE|SYS")
_GPU, _NIC = re.compile(r"GPU\d+"), re.compile(r"NIC\d+|mlx\d+_\d+|\w*roce\w*|rdma\w+|bnxt\w+|efa_\d+")
_MOST_NVLINKS = 18  # of a GPU: H100, B200
_NVSWITCH = "0x0680"  # class of a PCI bridge, as which an NVSwitch appears
_ENCODED = {2.5: 0.8, 5.0: 0.8}  # bits of 8b/10b; from 8 GT/s on 128b/130b


@dataclass(frozen=True)
class NodeLinks:
    """The links of one node.

    Attributes:
        kind_GG: of every two GPUs, an index of `KINDS`; -1 on the diagonal.
        nvlinks: of the GPU that has fewest, to all others together or to a switch; 0 where there are none.
        nearest_nics: for every GPU the network cards that are nearest to it.
        nic_gbit_per_s: of the slowest card; None where nobody says.
        pcie_gb_per_s: of the slowest GPU's link, each way; None where nobody says.
        compute_capability: of the GPUs, 90 for 9.0; None where nobody says.
    """

    kind_GG: tuple[tuple[int, ...], ...]
    nvlinks: int
    nearest_nics: tuple[tuple[str, ...], ...]
    nic_gbit_per_s: float | None = None
    pcie_gb_per_s: float | None = None
    compute_capability: int | None = None

    @property
    def num_gpus(self) -> int:
        """GPUs of the node."""
        return len(self.kind_GG)

    @property
    def nics(self) -> tuple[str, ...]:
        """Cards that are nearest to some GPU: those that its traffic takes."""
        return tuple(dict.fromkeys(nic for nearest in self.nearest_nics for nic in nearest))

    def joined(self, widest: str) -> list[tuple[int, ...]]:
        """GPUs that reach each other over links no wider than these, group after group."""
        limit, group = KINDS.index(widest), list(range(self.num_gpus))
        for a, row in enumerate(self.kind_GG):
            for b, kind in enumerate(row):
                if 0 <= kind <= limit and group[a] != group[b]:
                    gone, kept = max(group[a], group[b]), min(group[a], group[b])
                    group = [kept if one == gone else one for one in group]
        return [tuple(gpu for gpu, one in enumerate(group) if one == name) for name in dict.fromkeys(group)]

    def leaving(self, groups: Sequence[tuple[int, ...]]) -> int:
        """The nearest kind between GPUs of different groups, an index of `KINDS`."""
        of = {gpu: number for number, group in enumerate(groups) for gpu in group}
        return min(kind for a, row in enumerate(self.kind_GG) for b, kind in enumerate(row) if of[a] != of[b])


def read_node_links(path: Path) -> NodeLinks:
    """Read a file of either form.

    Raises:
        ValueError: it is neither, it was cut off, or it has fewer than two GPUs.
    """
    text = path.read_bytes().decode("utf-8", errors="replace")
    found = _of_xml(path, text) if text.lstrip().startswith("<") else _of_matrix(path, text)
    if found.num_gpus < 2:
        raise ValueError(f"{path}: lists {found.num_gpus} GPUs; a level needs two")
    return found


def _of_matrix(path: Path, text: str) -> NodeLinks:
    lines = [_COLOUR.sub("", line).split() for line in text.splitlines()]
    head = next((line for line in lines if line[:1] == ["GPU0"] and line[1:2] and not _CELL.fullmatch(line[1])), None)
    if head is None:
        raise ValueError(f"{path}: is neither what nvidia-smi topo -m prints nor a topology XML of NCCL")
    names = []
    for name in head:
        if not (_GPU.fullmatch(name) or _NIC.fullmatch(name)):
            break
        names.append(name)
    gpus = [name for name in names if _GPU.fullmatch(name)]
    cells = {line[0]: line[1 : 1 + len(names)] for line in lines if line and line[0] in gpus and line is not head}
    for gpu in gpus:
        row = cells.get(gpu, [])
        if len(row) < len(names) or not all(_CELL.fullmatch(cell) for cell in row):
            raise ValueError(f"{path}: row {gpu} has not a link for each of {len(names)} devices; was it cut off?")
    kinds = {gpu: dict(zip(names, map(_kind, cells[gpu]), strict=True)) for gpu in gpus}
    counts = [_links_of([int(cell[2:]) for cell in cells[gpu] if cell.startswith("NV")]) for gpu in gpus]
    cards = [name for name in names if name not in gpus]
    return NodeLinks(
        tuple(tuple(kinds[a][b] for b in gpus) for a in gpus),
        min(counts),
        tuple(_nearest({nic: kinds[gpu][nic] for nic in cards}) for gpu in gpus),
    )


def _links_of(to_each: Sequence[int]) -> int:
    """NVLinks of a GPU by what its row says: through a switch, all of them lead to every other GPU."""
    return sum(to_each) if sum(to_each) <= _MOST_NVLINKS else max(to_each)


def _kind(cell: str) -> int:
    if cell == "X":
        return -1
    return KINDS.index("NV" if cell.startswith("NV") else cell)


def _nearest(kind_of: dict[str, int]) -> tuple[str, ...]:
    return tuple(nic for nic, kind in kind_of.items() if kind == min(kind_of.values()))


def _of_xml(path: Path, text: str) -> NodeLinks:
    try:
        if "<!" in text:  # a document type could name files, or unpack without end
            raise ElementTree.ParseError("a topology has no document type and no comments")
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: no whole topology XML of NCCL: {error}") from error
    places = list(_places(root, ()))
    gpus = [(at, one) for at, one in places if one.find("gpu") is not None]
    nics = [(at, net) for at, one in places for net in one.iter("net") if one.find("nic") is not None]
    by_bus = {one.get("busid", "").lower(): place for place, (_, one) in enumerate(gpus)}
    wired: list[dict[int | str, int]] = [{} for _ in gpus]
    for place, (_, one) in enumerate(gpus):
        for link in one.iter("nvlink"):
            target = link.get("target", "").lower()
            switch = link.get("tclass", "").startswith(_NVSWITCH)
            peer = "switch" if switch else by_bus.get(target)
            if peer is not None and peer != place:
                wired[place][peer] = wired[place].get(peer, 0) + int(link.get("count", "1"))

    def kind(a: int, b: int) -> int:
        if a == b:
            return -1
        if b in wired[a] or ("switch" in wired[a] and "switch" in wired[b]):
            return KINDS.index("NV")
        return _between(gpus[a][0], gpus[b][0])

    speeds = [float(net.get("speed", 0)) / 1e3 for _, net in nics]
    pcie = [rate for _, one in gpus if (rate := _pcie_gb_per_s(one)) is not None]
    capability = [int(gpu.get("sm", 0)) for _, one in gpus for gpu in one.iter("gpu")]
    names = [net.get("name") or f"net {number}" for number, (_, net) in enumerate(nics)]
    return NodeLinks(
        tuple(tuple(kind(a, b) for b in range(len(gpus))) for a in range(len(gpus))),
        min((sum(links.values()) for links in wired), default=0),
        tuple(
            _nearest({name: _between(at, there) for name, (there, _) in zip(names, nics, strict=True)})
            for at, _ in gpus
        ),
        min((speed for speed in speeds if speed > 0), default=None),
        min(pcie) if len(pcie) == len(gpus) else None,
        min(capability, default=0) or None,
    )


def _places(
    element: ElementTree.Element, above: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], ElementTree.Element]]:
    """Every PCI device with where it is: its socket, then the bridges above it."""
    for number, one in enumerate(element):
        if one.tag == "cpu":
            yield from _places(one, (f"cpu {one.get('numaid', number)}",))
        elif one.tag == "pci":
            yield above, one
            yield from _places(one, (*above, one.get("busid", str(number))))


def _between(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """What lies between two devices below these bridges."""
    if a[:1] != b[:1]:
        return KINDS.index("SYS")
    shared = sum(1 for x, y in zip(a, b, strict=False) if x == y)
    if shared == 1:  # the socket alone
        return KINDS.index("PHB")
    return KINDS.index("PIX" if shared == len(a) == len(b) else "PXB")


def _pcie_gb_per_s(device: ElementTree.Element) -> float | None:
    speed, width = re.match(r"[\d.]+", device.get("link_speed", "")), device.get("link_width", "")
    if speed is None or not width.isdigit() or int(width) == 0:
        return None
    rate = float(speed[0])
    return rate * int(width) * _ENCODED.get(rate, 128 / 130) / 8
