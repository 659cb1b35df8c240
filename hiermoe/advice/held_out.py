"""What systems move under a placement that is not touched any more, on iterations that no decision has seen."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hiermoe.planner.cost import ALLTOALLS_PER_STEP
from hiermoe.planner.counts import RoutingCounts, separating_level
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.planner.traffic import exact_traffic
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy


@dataclass(frozen=True)
class HeldOut:
    """Bytes of every scheme that a system may choose, under one placement; any constants can price them.

    Attributes:
        schemes: candidates.
        busiest_bytes: for each, int64 [iteration, stage]: at the busiest GPU.
        crossing_bytes: for each, int64 [iteration, D]: that leave their group of the level, but not one further out;
            of one AlltoAll, all GPUs together.
    """

    schemes: tuple[DispatchScheme, ...]
    busiest_bytes: tuple[np.ndarray, ...]
    crossing_bytes: tuple[np.ndarray, ...]

    def scheme_ms(self, cluster: Cluster, share_of_bytes: float = 1.0) -> np.ndarray:
        """Time of the four AlltoAlls of a step under every scheme: float64 [scheme, iteration].

        Args:
            cluster: constants, of the hierarchy that was counted on.
            share_of_bytes: price only so many of them, as if there were so many tokens.
        """
        rows = []
        for scheme, stage_bytes in zip(self.schemes, self.busiest_bytes, strict=True):
            constants = [cluster.constants(stage.peers) for stage in scheme.stages]
            alpha_ms = sum(x.alpha_ms for x in constants)
            beta_S = np.array([x.beta_ms_per_byte for x in constants])
            rows.append(ALLTOALLS_PER_STEP * (alpha_ms + share_of_bytes * stage_bytes @ beta_S))
        return np.stack(rows)

    def step_ms(self, cluster: Cluster, share_of_bytes: float = 1.0) -> np.ndarray:
        """The same under the cheapest scheme of each iteration (Algorithm 1): float64 [iteration]."""
        return self.scheme_ms(cluster, share_of_bytes).min(0)

    def crossing(self, cluster: Cluster) -> np.ndarray:
        """Bytes across every level of one AlltoAll, under the cheapest scheme, mean over iterations: float64 [D]."""
        chosen_I = self.scheme_ms(cluster).argmin(0)
        return np.stack(self.crossing_bytes)[chosen_I, np.arange(len(chosen_I))].mean(0)


def count_held_out(
    schemes: Sequence[DispatchScheme], steps: Sequence[RoutingCounts], hierarchy: Hierarchy, row_bytes: int
) -> HeldOut:
    """Exact bytes of some iterations.

    Args:
        schemes: candidates.
        steps: counts of each iteration under the placement.
        hierarchy: groups of GPUs.
        row_bytes: M * v.
    """
    busiest, crossing = [], []
    for scheme in schemes:
        traffic = [exact_traffic(scheme, counts, hierarchy) for counts in steps]
        busiest.append(torch.stack([x.busiest_rows() for x in traffic]).numpy() * row_bytes)
        crossing.append(torch.stack([crossing_rows(x.rows_SGG, hierarchy) for x in traffic]).numpy() * row_bytes)
    return HeldOut(tuple(schemes), tuple(busiest), tuple(crossing))


def crossing_rows(rows_SGG: Tensor, hierarchy: Hierarchy) -> Tensor:
    """Rows by the outermost level whose groups they leave, all stages together: int64 [D].

    Args:
        rows_SGG: int64 [stage, source, destination].
        hierarchy: groups of GPUs.
    """
    level_GG = separating_level(hierarchy)  # D + 1 on the diagonal: these rows stay
    total = torch.zeros(hierarchy.depth + 2, dtype=torch.int64)
    return total.index_add_(0, level_GG.view(-1), rows_SGG.sum(0).view(-1))[1:-1]
