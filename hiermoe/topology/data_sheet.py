"""Alpha and beta of every exchange from what data sheets say of a cluster's ports.

A profile states, for each level, the port through which traffic leaves a group of that level. :func:`derived` makes the
constants of every exchange (world, inter, intra) from that, on whatever hierarchy, so they are never written down.

beta. n is what the busiest GPU receives, its own share included (paper, Sec. III-B). With even senders, of P GPUs that
exchange and P_l of them in one GPU's own group of level l, a share f_l = 1 - P_l / P of n enters that group. All GPUs
of a group exchange at the same time, and ``gpus`` of them share a port, so

    beta = max over levels l of  f_l * gpus_l * oversubscription_l / rate_l.

Assumptions: links in series work at the same time, so the slowest decides; a port carries both ways at its full rate
each; the GPUs that share a port all use it, whether they belong to this expert-parallel group or to another one that
exchanges at the same time; rails are balanced (``gpus`` of 1: each GPU has its own); rates are those on the label. So
beta is what no exchange can beat, and real ones stay above. How far, on the one cluster where both are known, the
paper's testbed: published betas (Fig. 9) are 1.3 to 2.4 times those that its link rates give
(tests/topology/test_data_sheet.py has each).

alpha. NCCL starts once and then posts P - 1 messages. A channel works on eight of them at a time
(NCCL_MAX_DEV_WORK_P2P_PER_BATCH), and each takes the latency of the outermost level that it crosses:

    alpha = start + max(largest latency, sum of the P - 1 latencies / 8).

Start and latencies are those that NCCL itself plans with (src/graph/tuning.cc, ring and Simple protocol: 8.4 us to
start; a message 3.4 us over NVLink, 5.7 us over PCIe, 14 us over the network). That eights follow one another, and that
nothing else starts an exchange, is an assumption: the serial sum is what NCCL charges a ring, a single latency what
hardware would allow. Alpha cannot be checked on the paper's testbed: what Fig. 9 publishes (0.11 to 0.72 ms, more for 2
GPUs than for 4) is start-up of the framework, of which no data sheet speaks.
"""

from collections.abc import Sequence

from pydantic import Field

from hiermoe.records.strict import Strict
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import AlphaBeta, Peers

START_US = 8.4
MESSAGES_AT_ONCE = 8
DERIVED = "derived from data sheets"  # what the source of a derived constant begins with
CAVEAT = "constants from data sheets, not calibrated"  # to stand wherever numbers of such a cluster are shown


class Port(Strict):
    """How traffic leaves a group of a level, as data sheets state it.

    Attributes:
        gb_per_s: rate of one port, each way.
        gpus: GPUs of the group that share one port.
        latency_us: of one message between two GPUs that this level is the first to separate.
        oversubscription: rate of all ports of a group over what the switches above it carry; 1: all of it.
        source: where these are from.
    """

    gb_per_s: float = Field(gt=0)
    gpus: int = Field(ge=1)
    latency_us: float = Field(ge=0)
    oversubscription: float = Field(default=1.0, ge=1)
    source: str

    def ms_per_byte(self, lanes: int) -> float:
        """Time per byte that each GPU of a group of ``lanes`` sends out of it, all at the same time."""
        return min(self.gpus, lanes) * self.oversubscription / (self.gb_per_s * 1e6)


def crossing_share(peers: Peers, level: int, hierarchy: Hierarchy) -> float:
    """f: the share of n that enters a GPU's group of a level from outside, with even senders."""
    return 1 - peers.size_inside(level, hierarchy) / peers.size(hierarchy)


def derived(peers: Peers, hierarchy: Hierarchy, ports: Sequence[Port]) -> AlphaBeta:
    """Alpha and beta of an exchange, by the formulas above.

    Args:
        peers: who exchange.
        hierarchy: groups of GPUs.
        ports: of levels 1..D.
    """
    size, latencies_us, inside = peers.size(hierarchy), [], peers.size(hierarchy)
    slowest, beta = 0, 0.0
    for level, port in enumerate(ports, start=1):
        crossing = crossing_share(peers, level, hierarchy) * port.ms_per_byte(hierarchy.lanes(level))
        if crossing > beta:
            slowest, beta = level - 1, crossing
        still_inside = peers.size_inside(level, hierarchy)
        latencies_us += [port.latency_us] * (inside - still_inside)  # peers that this level is the first to separate
        inside = still_inside
    waiting_us = max(max(latencies_us), sum(latencies_us) / MESSAGES_AT_ONCE) if size > 1 else 0.0
    named = hierarchy.names[slowest] if hierarchy.names else f"level {slowest + 1}"
    return AlphaBeta(
        alpha_ms=(START_US + waiting_us) / 1e3,
        beta_ms_per_byte=beta,
        source=f"{DERIVED}: the ports of a {named} decide ({ports[slowest].source})",
        published=False,
    )
