"""SmartMoE's expert placement (Zhai et al., USENIX ATC 2023), written from its published description.

Every F iterations all experts are packed anew: by falling token count, each to the least loaded GPU that has a free
slot. The aim is the smallest maximum of token counts per GPU; links and duplicates do not enter. The histogram is the
mean over the interval. Two defects of the public artifact are not reproduced: it moves only the model-precision
weights, so that the optimizer's masters undo the move, and it remaps dropped tokens through a negative index.
"""

import torch
from torch import Tensor

from hiermoe.policies.protocol import PlacementPolicy, PlacementUpdate, StepContext, refuse_copies
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement


class SmartMoEPolicy(PlacementPolicy):
    """Full repack by token counts every ``interval`` iterations."""

    def __init__(self, interval: int = 10) -> None:
        """Set the policy up for one layer.

        Raises:
            ValueError: an interval below 1.
        """
        if interval < 1:
            raise ValueError(f"interval={interval} must be at least 1")
        self.interval = interval
        self._sum_E: Tensor | None = None

    def measure(
        self, expert_ids_NK: Tensor, source_N: Tensor, placement: Placement, hierarchy: Hierarchy, iteration: int
    ) -> Tensor | None:
        """Tokens of every logical expert: int64 [E]."""
        refuse_copies(self, placement)
        return torch.bincount(expert_ids_NK.reshape(-1), minlength=placement.num_experts)

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        """At the end of an interval, the new packing if it lowers the largest load."""
        assert summed is not None
        self._sum_E = summed if self._sum_E is None else self._sum_E + summed
        if (context.iteration + 1) % self.interval:
            return None
        load_E, self._sum_E = self._sum_E, None
        num_ranks = context.cluster.hierarchy.num_ranks
        packed = pack(load_E, placement, num_ranks)
        if largest_load(load_E, packed, num_ranks) >= largest_load(load_E, placement, num_ranks):
            return None
        return PlacementUpdate(packed, None)

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
            raise ValueError(f"SmartMoEPolicy remembers sum_E, the state has {', '.join(state)}")
        self._sum_E = state.get("sum_E")


def pack(load_E: Tensor, placement: Placement, num_ranks: int) -> Placement:
    """Greedy packing: experts by falling load, each to the least loaded GPU with a free slot.

    Ties between GPUs go to the expert's present GPU if it is among them, else to the lowest one; ties between experts
    to the lower one.

    Args:
        load_E: [E], tokens of each logical expert.
        placement: where experts sit now.
        num_ranks: G.

    Returns:
        The new placement; an expert that keeps its GPU keeps its slot where that slot is still free.
    """
    per_rank = placement.per_rank(num_ranks)
    present = placement.rank_of(num_ranks).tolist()
    load = [0] * num_ranks
    members, rank_E = [0] * num_ranks, torch.empty_like(placement.slot_E)
    loads = load_E.tolist()
    for expert in torch.argsort(load_E, descending=True, stable=True).tolist():
        least = min(load[rank] for rank in range(num_ranks) if members[rank] < per_rank)
        tied = [rank for rank in range(num_ranks) if members[rank] < per_rank and load[rank] == least]
        rank = present[expert] if present[expert] in tied else tied[0]
        rank_E[expert] = rank
        members[rank] += 1
        load[rank] += loads[expert]
    return placement.on_ranks(rank_E, num_ranks)


def largest_load(load_E: Tensor, placement: Placement, num_ranks: int) -> int:
    """Tokens of the most loaded GPU."""
    return int(torch.zeros(num_ranks, dtype=load_E.dtype).index_add_(0, placement.rank_of(num_ranks), load_E).max())
