"""EPLB (deepseek-ai/EPLB), written from a description of its algorithm.

From the loads of the past, every ``interval`` iterations: hot experts get copies, one by one the expert whose copies
have most each; copies are packed by falling load, each to the lightest GPU that has room. Hierarchical: groups of
experts are packed to nodes first, and copies are made and packed inside each node. Made for inference: here an expert
moves with its training state, and copies get weights and send gradients in every step. Which copy a source uses EPLB
leaves open: the nearest in the hierarchy, evenly where several are.
"""

import torch
from torch import Tensor

from baselines.choices_of_copies import evenly_among_nearest
from baselines.guests import check_spare, domain_level
from hiermoe.policies.protocol import CopyTerms, PlacementPolicy, PlacementUpdate, StepContext
from hiermoe.routing.step import num_slots
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement


class EPLBPolicy(PlacementPolicy):
    """Copies by the loads of the past interval."""

    def __init__(
        self, spare: int = 2, interval: int = 10, hierarchical: bool = False, groups: int | None = None,
        gradient_bytes: int = 2,
    ) -> None:  # fmt: skip
        """Set the policy up for one layer.

        Args:
            spare: slots a GPU beyond its own experts.
            interval: iterations between updates.
            hierarchical: whether groups of experts are packed to nodes.
            groups: of experts; None: as many as GPUs.
            gradient_bytes: of a parameter.

        Raises:
            ValueError: no slot, an interval below 1, or another number of bytes.
        """
        check_spare(spare)
        if interval < 1:
            raise ValueError(f"interval={interval} must be at least 1")
        self.spare, self.interval, self.hierarchical, self.groups = spare, interval, hierarchical, groups
        self.copies = CopyTerms(shared_buffers=False, gradient_bytes=gradient_bytes)
        self._sum_E: Tensor | None = None

    def measure(
        self, expert_ids_NK: Tensor, source_N: Tensor, placement: Placement, hierarchy: Hierarchy, iteration: int
    ) -> Tensor | None:
        """Tokens of every logical expert: int64 [E]."""
        return torch.bincount(expert_ids_NK.reshape(-1), minlength=placement.num_experts)

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        """At the end of an interval, what its loads ask for."""
        assert summed is not None
        self._sum_E = summed if self._sum_E is None else self._sum_E + summed
        if (context.iteration + 1) % self.interval:
            return None
        load_E, self._sum_E = self._sum_E, None
        hierarchy = context.cluster.hierarchy
        ranks, experts = hierarchy.num_ranks, len(load_E)
        slots = num_slots(experts, ranks) + self.spare * ranks
        groups, nodes = 1, 1
        if self.hierarchical:
            groups, nodes = self.groups or ranks, hierarchy.U[domain_level(hierarchy)]
        layout = torch.tensor(balanced(load_E.tolist(), slots, groups, nodes, ranks))
        return PlacementUpdate(evenly_among_nearest(layout, hierarchy), None)

    def state_dict(self) -> dict[str, Tensor]:
        """The tokens of every expert since the last update: int64 [E]; nothing right after one."""
        return {} if self._sum_E is None else {"sum_E": self._sum_E}

    def shared_state(self) -> dict[str, Tensor]:
        """Nothing: one rank decides."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: the state of another policy.
        """
        if state.keys() - {"sum_E"}:
            raise ValueError(f"EPLBPolicy remembers sum_E, the state has {', '.join(state)}")
        self._sum_E = state.get("sum_E")


def balanced(load: list[int], slots: int, groups: int, nodes: int, gpus: int) -> list[int]:
    """Expert in each slot.

    Args:
        load: tokens of every expert.
        slots: in all; GPUs have equally many.
        groups: of consecutive experts, of which each node gets equally many whole ones; 1: groups do not count.
        nodes: 1 where groups do not count.
        gpus: G.

    Raises:
        ValueError: sizes that do not divide.
    """
    experts = len(load)
    for name, total, by in (("groups", experts, groups), ("nodes", groups, nodes), ("gpus", slots, gpus)):
        if total % by:
            raise ValueError(f"{name}={by} does not divide {total}")
    size = experts // groups
    of_node = pack([sum(load[group * size : (group + 1) * size]) for group in range(groups)], nodes)
    layout: list[int] = []
    for mine in of_node:
        here = [group * size + i for group in mine for i in range(size)]
        copies = replicated([load[expert] for expert in here], slots // nodes)
        number = [copies.count(i) for i in range(len(here))]
        each = [load[here[i]] / number[i] for i in copies]
        layout += [here[copies[item]] for gpu in pack(each, gpus // nodes) for item in gpu]
    return layout


def replicated(load: list[int], slots: int) -> list[int]:
    """Every expert once, then one copy after the other of the expert whose copies have most each."""
    number, copies = [1] * len(load), list(range(len(load)))
    for _ in range(slots - len(load)):
        hottest = max(range(len(load)), key=lambda expert: load[expert] / number[expert])
        number[hottest] += 1
        copies.append(hottest)
    return copies


def pack(weights: list[float] | list[int], packs: int) -> list[list[int]]:
    """Items of every pack, in the order in which they came: by falling weight, each to the lightest pack with room."""
    room = len(weights) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    filled: list[list[int]] = [[] for _ in range(packs)]
    total = [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        lightest = min((p for p in range(packs) if len(filled[p]) < room), key=lambda p: total[p])
        filled[lightest].append(item)
        total[lightest] += weights[item]
    return filled
