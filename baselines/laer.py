"""LAER-MoE's layouts (arXiv 2602.11686 and its public artifact), written from a description of them.

Weights are fully sharded: every GPU has a part of every expert, and fills all its slots from these in every step, so
that a new layout moves nothing more and no training state. Each iteration lays the slots out anew from the sum of the
last counts: the layout is the cheapest of a greedy one, a uniform one, and perturbations of both. Sources split
evenly among the copies in their node, else among all.
"""

import torch
from torch import Tensor

from baselines.choices_of_copies import evenly_among_nearest
from baselines.guests import check_spare, domain_level
from hiermoe.planner.counts import separating_level
from hiermoe.policies.protocol import CopyTerms, PlacementPolicy, PlacementUpdate, StepContext
from hiermoe.routing.step import num_slots
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement

PERTURBED = 2  # of each layout


class LAERPolicy(PlacementPolicy):
    """A new layout of all slots in every iteration."""

    def __init__(
        self,
        spare: int = 2,
        window: int = 5,
        inside_gb_per_s: float = 216.0,
        across_gb_per_s: float = 89.0,
        tflops: float = 100.0,
        shared_buffers: bool = True,
        gradient_bytes: int = 2,
    ) -> None:
        """Set the policy up for one layer.

        Args:
            spare: slots a GPU beyond its even part of the experts.
            window: iterations whose counts are summed.
            inside_gb_per_s: rate between GPUs of a node, in the model that chooses a layout.
            across_gb_per_s: likewise, of different nodes.
            tflops: what a GPU computes with, 10^12 operations a second.
            shared_buffers: whether layers share the slots.
            gradient_bytes: of a parameter.

        Raises:
            ValueError: no slot, no iteration, a rate that is not positive, or another number of bytes.
        """
        check_spare(spare)
        if window < 1 or min(inside_gb_per_s, across_gb_per_s, tflops) <= 0:
            rates = f"inside_gb_per_s={inside_gb_per_s}, across_gb_per_s={across_gb_per_s}, tflops={tflops}"
            raise ValueError(f"window={window} must be at least 1, and {rates} positive")
        self.spare, self.window, self.tflops = spare, window, tflops
        self.inside_gb_per_s, self.across_gb_per_s = inside_gb_per_s, across_gb_per_s
        self.copies = CopyTerms(shared_buffers, gradient_bytes, sharded=True)
        self._last: list[Tensor] = []

    def measure(
        self, expert_ids_NK: Tensor, source_N: Tensor, placement: Placement, hierarchy: Hierarchy, iteration: int
    ) -> Tensor | None:
        """Tokens of every source for every logical expert: int64 [G, E]."""
        experts = placement.num_experts
        code_NK = source_N[:, None] * experts + expert_ids_NK
        return torch.bincount(code_NK.view(-1), minlength=hierarchy.num_ranks * experts).view(-1, experts)

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        """The cheapest layout for the sum of the last counts."""
        assert summed is not None
        self._last = [*self._last, summed][-self.window :]
        pairs_GE, hierarchy = torch.stack(self._last).sum(0), context.cluster.hierarchy
        level = domain_level(hierarchy)
        ranks, experts = pairs_GE.shape
        slots = num_slots(experts, ranks) + self.spare * ranks
        first = torch.tensor(greedy_layout(pairs_GE.sum(0).tolist(), slots, ranks, hierarchy.U[level]))
        generator = torch.Generator().manual_seed(context.iteration)
        layouts = [first, torch.arange(slots) % experts]
        layouts += [perturbed(layout, generator) for layout in layouts for _ in range(PERTURBED)]
        candidates = [evenly_among_nearest(layout, hierarchy, level) for layout in layouts]
        best = min(candidates, key=lambda one: self.modelled_ms(pairs_GE, one, context))
        return None if best.key == placement.key else PlacementUpdate(best, None)

    def modelled_ms(self, pairs_GE: Tensor, placement: Placement, context: StepContext) -> float:
        """4 times the communication of all GPUs in sum, 3 times the computation of the busiest."""
        hierarchy = context.cluster.hierarchy
        ranks = hierarchy.num_ranks
        assert placement.quota_GS is not None
        quota_GS, expert_at_S = placement.quota_GS.double(), placement.expert_at_S
        total_GE = torch.zeros(pairs_GE.shape, dtype=torch.float64).index_add_(1, expert_at_S, quota_GS)
        rows_GR = (pairs_GE[:, expert_at_S] * quota_GS / total_GE[:, expert_at_S]).view(ranks, ranks, -1).sum(-1)
        inside_GR = separating_level(hierarchy) > domain_level(hierarchy)
        rate_GR = torch.where(inside_GR, self.inside_gb_per_s, self.across_gb_per_s).fill_diagonal_(float("inf"))
        comm_ms = float((rows_GR * context.row_bytes.mean / (rate_GR * 1e6)).sum())
        compute_ms = float(rows_GR.sum(0).max()) * 2 * context.expert_parameters / (self.tflops * 1e9)
        return 4 * comm_ms + 3 * compute_ms

    def state_dict(self) -> dict[str, Tensor]:
        """The counts of the last iterations: int64 [n, G, E]; nothing before the first."""
        return {"last": torch.stack(self._last)} if self._last else {}

    def shared_state(self) -> dict[str, Tensor]:
        """Nothing: one rank decides."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: the state of another policy.
        """
        if state.keys() - {"last"}:
            raise ValueError(f"LAERPolicy remembers last, the state has {', '.join(state)}")
        self._last = list(state["last"]) if "last" in state else []


def greedy_layout(load: list[int], slots: int, ranks: int, nodes: int) -> list[int]:
    """Expert in each slot: experts by falling load of a copy, each copy where the fewest and then the least are.

    Args:
        load: tokens of every expert.
        slots: in all; GPUs have equally many.
        ranks: G.
        nodes: groups of equally many neighbouring GPUs.
    """
    number = copies_of(load, slots, ranks, nodes)
    held: list[list[int]] = [[] for _ in range(ranks)]
    total, of_node = [0.0] * ranks, ranks // nodes
    for expert in sorted(range(len(load)), key=lambda e: -load[e] / number[e]):
        in_node = [0] * nodes
        for _ in range(number[expert]):
            able = [rank for rank in range(ranks) if len(held[rank]) < slots // ranks]
            able = [rank for rank in able if expert not in held[rank]] or able
            fewest = min(in_node[rank // of_node] for rank in able)
            there = [rank for rank in able if in_node[rank // of_node] == fewest]
            rank = min(there, key=lambda rank: total[rank])
            held[rank].append(expert)
            total[rank] += load[expert] / number[expert]
            in_node[rank // of_node] += 1
    return [expert for mine in held for expert in mine]


def copies_of(load: list[int], slots: int, ranks: int, nodes: int) -> list[int]:
    """Copies of every expert: one a node where that fits, else one; then more of the one whose copies have most each.

    One more up to one a node, from there on one more a node, while there are slots and no GPU needs two. Slots that are
    left when every GPU has every expert are given out one by one.
    """
    first = nodes if len(load) * nodes <= slots else 1
    number = [first] * len(load)
    growing, left = set(range(len(load))), slots - first * len(load)
    while left and growing:
        hottest = max(sorted(growing), key=lambda e: load[e] / number[e])
        more = 1 if number[hottest] < nodes else nodes
        if more > left or number[hottest] + more > ranks:
            growing.remove(hottest)
            continue
        number[hottest] += more
        left -= more
    for _ in range(left):
        hottest = max(range(len(load)), key=lambda e: load[e] / number[e])
        number[hottest] += 1
    return number


def perturbed(layout: Tensor, generator: torch.Generator) -> Tensor:
    """The layout after two slots, drawn at random, have exchanged their experts."""
    a, b = torch.randint(len(layout), (2,), generator=generator).tolist()
    changed = layout.clone()
    changed[a], changed[b] = layout[b], layout[a]
    return changed
