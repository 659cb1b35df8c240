"""Profiles from what a node says of its links: the forms of the field, and what they lack."""

from pathlib import Path

import pytest

from hiermoe.topology.node_links import read_node_links
from hiermoe.topology.profile_of_links import LinkRates, profile

LEGEND = "\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing # NVLinks\n\nNIC Legend:\n\n  NIC0: mlx5_0\n"


def matrix(links: list[str], nics: list[str] = [], names: str = "NIC{}") -> str:  # noqa: B006 - never changed
    """Rows of GPU-GPU links, a letter or more each, then of GPU-NIC links; as it is printed, with underlined head."""
    head = [f"GPU{i}" for i in range(len(links))] + [
        names.format(i) for i in range(len(nics[0].split()) if nics else 0)
    ]
    lines = ["\x1b[4m\t" + "\t".join(head) + "\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m"]
    for i, row in enumerate(links):
        cells = [*row.split(), *(nics[i].split() if nics else [])]
        lines.append(
            f"GPU{i}\t" + "\t".join(f" {cell} " if cell == "X" else cell for cell in cells) + "\t0-47,96-143\t0\t\tN/A"
        )
    lines += [f"{names.format(i)}\t" + "\t".join(["SYS"] * len(head)) for i in range(len(head) - len(links))]
    return "\n".join(lines) + "\n" + LEGEND


def square(num_gpus: int, kind: object) -> list[str]:
    """Links by a function of two GPUs."""
    return [" ".join("X" if a == b else kind(a, b) for b in range(num_gpus)) for a in range(num_gpus)]  # type: ignore[operator]


SWITCHED = matrix(
    square(8, lambda a, b: "NV18"),
    [" ".join("PIX" if n == a else "NODE" if n // 4 == a // 4 else "SYS" for n in range(9)) for a in range(8)],
)
PAIRS = matrix(
    square(8, lambda a, b: "NV4" if a // 2 == b // 2 else "NODE" if a // 4 == b // 4 else "SYS"),
    ["NODE" if a < 4 else "SYS" for a in range(8)],
    "mlx5_{}",
)
BRIDGES = matrix(square(4, lambda a, b: "PIX" if a // 2 == b // 2 else "PHB"))
MESH = matrix(square(4, lambda a, b: "NV4"), ["PXB PXB SYS SYS"] * 2 + ["SYS SYS PXB PXB"] * 2)


def gpu(bus: str, dev: int, links: str) -> str:
    return (
        f'<pci busid="{bus}" class="0x030200" vendor="0x10de" link_speed="32.0 GT/s PCIe" link_width="16">'
        f'<gpu dev="{dev}" sm="90" rank="{dev}" gdr="1">{links}</gpu></pci>'
    )


def card(bus: str, number: int) -> str:
    return (
        f'<pci busid="{bus}" class="0x020700" link_speed="32.0 GT/s PCIe" link_width="16"><nic>'
        f'<net name="mlx5_{number}" dev="{number}" speed="200000" port="1" gdr="1"/></nic></pci>'
    )


def xml(switched: bool) -> str:
    """Two sockets with a PCIe switch each, below it two GPUs and a card."""
    cpus = []
    for socket in (0, 1):
        inside = ""
        for place in (0, 1):
            links = "".join(f'<nvlink target="0000:0{n}:00.0" count="4" tclass="0x068000"/>' for n in (5, 6))
            inside += gpu(f"0000:{socket}{place + 1}:00.0", 2 * socket + place, links if switched else "")
        bridge = f'<pci busid="0000:{socket}0:00.0" class="0x060400" link_speed="32.0 GT/s PCIe" link_width="16">'
        cpus.append(
            f'<cpu numaid="{socket}" affinity="ffff" arch="x86_64" vendor="GenuineIntel" familyid="6" modelid="143">'
            f"{bridge}{inside}{card(f'0000:{socket}3:00.0', socket)}</pci></cpu>"
        )
    return f'<system version="1">{"".join(cpus)}</system>'


def levels(tmp_path: Path, text: str, nodes: int = 1, **rates: float) -> list[tuple[str, int, float, int]]:
    """Name, groups, rate and sharers of every level."""
    path = tmp_path / "node.txt"
    path.write_text(text)
    cluster = profile(read_node_links(path), nodes, LinkRates.model_validate(rates), "ours", path.name)
    sources = [level.port.source for level in cluster.levels if level.port is not None]
    assert all(source.startswith(("node.txt: ", "stated: ")) for source in sources)
    return [(x.name, x.groups, x.port.gb_per_s, x.port.gpus) for x in cluster.levels if x.port is not None]


def test_nvlink_switches_are_one_level_and_spare_cards_do_not_count(tmp_path: Path) -> None:
    found = levels(tmp_path, SWITCHED, 4, network_gbit_per_s=400, nvlink_gb_per_s=25)
    assert found == [("node", 4, 50.0, 1), ("gpu", 32, 450.0, 1)]


def test_the_papers_node_has_its_four_levels(tmp_path: Path) -> None:
    given = {"network_gbit_per_s": 200, "nvlink_gb_per_s": 14.0625, "pcie_gb_per_s": 31.5, "socket_gb_per_s": 31.5}
    assert levels(tmp_path, PAIRS, 4, **given) == [
        ("node", 4, 25.0, 8),
        ("socket", 8, 31.5, 4),
        ("nvlink_group", 16, 31.5, 1),
        ("gpu", 32, 56.25, 1),
    ]


def test_gpus_behind_one_switch_share_its_link_up(tmp_path: Path) -> None:
    assert levels(tmp_path, BRIDGES, pcie_gb_per_s=31.5) == [("switch", 2, 31.5, 2), ("gpu", 4, 31.5, 1)]


def test_nvlinks_without_a_switch_add_up_and_several_cards_serve_a_gpu(tmp_path: Path) -> None:
    found = levels(tmp_path, MESH, 2, network_gbit_per_s=100, nvlink_gb_per_s=25)
    assert found == [("node", 2, 12.5, 1), ("gpu", 8, 300.0, 1)]


@pytest.mark.parametrize("switched", [True, False])
def test_the_xml_has_the_rates_too(switched: bool, tmp_path: Path) -> None:
    pcie = 32 * 16 * 128 / 130 / 8
    node = ("node", 3, 25.0, 2)
    if switched:
        assert levels(tmp_path, xml(True), 3) == [node, ("gpu", 12, 8 * 25.0, 1)]
    else:
        found = levels(tmp_path, xml(False), 3, socket_gb_per_s=60)
        assert found == [node, ("socket", 6, 60.0, 2), ("gpu", 12, pytest.approx(pcie, abs=1e-3), 1)]


LACKING = [
    ("no links here\n", {}, "is neither what nvidia-smi topo -m prints nor a topology XML of NCCL"),
    (
        SWITCHED[: SWITCHED.index("\nGPU5\t") + 30],
        {},
        "row GPU5 has not a link for each of 17 devices; was it cut off?",
    ),
    (SWITCHED, {"nvlink_gb_per_s": 25}, "has no rate of its network cards; say network_gbit_per_s="),
    (SWITCHED, {"network_gbit_per_s": 400}, "does not say which NVLinks; say nvlink_gb_per_s="),
    (BRIDGES, {"pcie_gb_per_s": 31.5}, "lists no network cards; say nics= of a node"),
    (PAIRS, {"network_gbit_per_s": 200, "nvlink_gb_per_s": 25}, "has no rate between sockets; say socket_gb_per_s="),
    (xml(True)[:-40], {}, "no whole topology XML of NCCL"),
    ('<!DOCTYPE a [<!ENTITY b "c">]>' + xml(True), {}, "has no document type"),
    (matrix(square(1, None), ["PIX"]), {}, "lists 1 GPUs; a level needs two"),
    (
        matrix(square(4, lambda a, b: "NV4" if a % 2 == b % 2 else "SYS"), ["PIX"] * 4),
        {"network_gbit_per_s": 100, "nvlink_gb_per_s": 25, "pcie_gb_per_s": 31.5},
        "number GPUs so: CUDA_VISIBLE_DEVICES=0,2,1,3",
    ),
    (
        matrix(square(4, lambda a, b: "NV4" if max(a, b) < 3 else "SYS"), ["PIX"] * 4),
        {"network_gbit_per_s": 100, "nvlink_gb_per_s": 25, "pcie_gb_per_s": 31.5},
        r"are groups of \[1, 3\]; a level needs equal ones",
    ),
    (SWITCHED, {"network_gbit_per_s": 400, "nics": 3}, "nics=3 and 8 GPUs of a node do not divide"),
]


@pytest.mark.parametrize(("text", "rates", "said"), LACKING)
def test_what_lacks_is_said_in_one_line(text: str, rates: dict[str, float], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"node\.txt|nics=3") as caught:
        levels(tmp_path, text, 2, **rates)
    assert "\n" not in str(caught.value)
    caught.match(said)
