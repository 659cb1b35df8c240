"""What a search minimises: the four AlltoAlls of a mean step, as the cost model prices them from group counts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hiermoe.model import RowBytes
from hiermoe.planner.cost import ALLTOALLS_PER_STEP, cheapest, time_by_groups
from hiermoe.planner.counts import sort_choices
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.planner.token_sets import TokenSets
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement


@dataclass(frozen=True)
class Objective:
    """Time of a placement.

    Rows are group counts divided by the lanes of the stage, as Q counts them, so that only expert sets are needed and
    not which GPU holds a token. Each step has its own busiest group and its own cheapest scheme.

    Attributes:
        cluster: hierarchy, alpha and beta.
        schemes: candidates.
        row_bytes: in each AlltoAll of a step.
    """

    cluster: Cluster
    schemes: tuple[DispatchScheme, ...]
    row_bytes: RowBytes

    def __post_init__(self) -> None:
        if not self.schemes:
            raise ValueError("a search needs a scheme to price")
        for scheme in self.schemes:
            if not scheme.deduplicates:
                raise ValueError(f"a search prices deduplicated traffic; scheme {scheme.name} sends token-expert pairs")

    def scheme_ms(self, sets: TokenSets, placement: Placement) -> Tensor:
        """One AlltoAll of every scheme in every step: float64 [schemes, S]."""
        busiest = [x_SU.amax(1) for x_SU in needed_by_step(sets, placement, self.cluster.hierarchy)]
        times = (
            time_by_groups(x, lambda level: busiest[level - 1], self.cluster, self.row_bytes) for x in self.schemes
        )
        return torch.stack(list(times))

    def step_ms(self, sets: TokenSets, placement: Placement) -> float:
        """Four AlltoAlls under the cheapest scheme of each step, mean over steps."""
        return ALLTOALLS_PER_STEP * float(self.scheme_ms(sets, placement).amin(0).mean())

    def cheapest(self, sets: TokenSets, placement: Placement) -> DispatchScheme:
        """The scheme with the smallest mean time, the first one on ties."""
        return self.schemes[cheapest(self.scheme_ms(sets, placement).mean(1).tolist())]


def needed_by_step(sets: TokenSets, placement: Placement, hierarchy: Hierarchy) -> Sequence[Tensor]:
    """Tokens of a step that need each group, scaled from the sample to the step: float64 [S, U] for levels 1..D.

    Raises:
        ValueError: E is not divisible by G.
    """
    choices = sort_choices(sets.ids_NK, placement, hierarchy)
    weight_N = sets.weight_N.double()
    sampled_S = torch.bincount(sets.step_N, weights=weight_N, minlength=sets.num_steps)
    scale_S = sets.tokens_S / sampled_S.clamp(min=1.0)
    return [x_SU * scale_S[:, None] for x_SU in choices.distinct(sets.step_N, sets.num_steps, hierarchy, weight_N)]
