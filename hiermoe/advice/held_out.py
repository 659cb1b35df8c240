"""What systems move under a placement that is not touched any more, on iterations that no decision has seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hiermoe.advice.case import Case
from hiermoe.analysis.whole_step import Compute
from hiermoe.model import RowBytes
from hiermoe.planner.cost import ALLTOALLS_PER_STEP, time_of_alltoall, times_of_stages
from hiermoe.planner.counts import separating_level
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.planner.traffic import exact_traffic
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import Peers
from hiermoe.topology.placement import Placement


@dataclass(frozen=True)
class HeldOut:
    """Rows of every scheme that a system may choose, under one placement; any constants can price them.

    Attributes:
        schemes: candidates.
        row_bytes: in each AlltoAll of a step.
        busiest_rows: for each scheme, int64 [iteration, stage]: at the busiest GPU.
        crossing_rows: for each, int64 [iteration, D]: that leave their group of the level, but not one further out; of
            one AlltoAll, all GPUs together.
        expert_rows: int64 [iteration]: token-expert pairs at the busiest GPU, before a scheme drops any.
    """

    schemes: tuple[DispatchScheme, ...]
    row_bytes: RowBytes
    busiest_rows: tuple[np.ndarray, ...]
    crossing_rows: tuple[np.ndarray, ...]
    expert_rows: np.ndarray

    def compute_ms(self, compute: Compute, tokens: float, share_of_bytes: float = 1.0) -> np.ndarray:
        """Computation of a step and layer: float64 [iteration].

        Args:
            compute: what a GPU computes with.
            tokens: of a GPU.
            share_of_bytes: as if there were only so many of them.
        """
        return compute.layer_ms(share_of_bytes * tokens, share_of_bytes * self.expert_rows)

    def stage_ms(self, cluster: Cluster, share_of_bytes: float = 1.0) -> list[np.ndarray]:
        """Time of every stage of every scheme in the four AlltoAlls of a step: float64 [iteration, stage] each.

        They add up to the step's: where stages overlap, each counts with its share of all.

        Args:
            cluster: constants, of the hierarchy that was counted on.
            share_of_bytes: price only so many of them, as if there were so many tokens.
        """

        def alltoall_ms(scheme: DispatchScheme, rows_IS: np.ndarray, row_bytes: float) -> np.ndarray:
            stage_ms = times_of_stages(scheme, (share_of_bytes * (rows_IS * row_bytes)).T, cluster)
            ms_IS = np.stack(stage_ms, axis=1)
            if scheme.chunks > 1:
                ms_IS *= (time_of_alltoall(scheme, stage_ms, cluster) / ms_IS.sum(1))[:, None]
            return ms_IS

        counted = zip(self.schemes, self.busiest_rows, strict=True)
        return [ALLTOALLS_PER_STEP * self.row_bytes.averaged(partial(alltoall_ms, *one)) for one in counted]

    def chosen(self, cluster: Cluster) -> np.ndarray:
        """Position of the cheapest scheme in every iteration (Algorithm 1): int64 [iteration]."""
        return np.stack([x.sum(1) for x in self.stage_ms(cluster)]).argmin(0)

    def step_ms(self, cluster: Cluster, share_of_bytes: float = 1.0) -> np.ndarray:
        """Time of the four AlltoAlls of a step under the cheapest scheme: float64 [iteration]."""
        return np.stack([x.sum(1) for x in self.stage_ms(cluster, share_of_bytes)]).min(0)

    def mean_stages(self, cluster: Cluster) -> dict[Peers, float]:
        """Time that each kind of exchange takes in a step, mean over iterations, in the order of the stages."""
        chosen_I, total = self.chosen(cluster), {}
        for position, (scheme, ms_IS) in enumerate(zip(self.schemes, self.stage_ms(cluster), strict=True)):
            for stage, ms in zip(scheme.stages, ms_IS[chosen_I == position].sum(0), strict=True):
                total[stage.peers] = total.get(stage.peers, 0.0) + float(ms) / len(chosen_I)
        return {peers: ms for peers, ms in total.items() if ms}

    def schemes_used(self, cluster: Cluster) -> list[DispatchScheme]:
        """Those that are the cheapest in some iteration, in the order of the candidates."""
        return [self.schemes[position] for position in np.unique(self.chosen(cluster))]

    def dimensions(self, cluster: Cluster) -> dict[int, float]:
        """Share of iterations in which each dimension is the cheapest (d*), by falling share."""
        positions, counts = np.unique(self.chosen(cluster), return_counts=True)
        shares = {self.schemes[p].dimension: n / counts.sum() for p, n in zip(positions, counts, strict=True)}
        return dict(sorted(shares.items(), key=lambda one: -one[1]))

    def crossing(self, cluster: Cluster) -> np.ndarray:
        """Bytes across every level of one AlltoAll, under the cheapest scheme, mean over iterations: float64 [D].

        Of the four AlltoAlls of a step, whose rows may differ, the mean.
        """
        chosen_I = self.chosen(cluster)
        rows_ID = np.stack(self.crossing_rows)[chosen_I, np.arange(len(chosen_I))]
        return (rows_ID * self.row_bytes.mean).mean(0)


@dataclass(frozen=True)
class HeldOutLayers:
    """The same of several layers, one after another in every step."""

    layers: tuple["HeldOut | HeldOutLayers", ...]

    def compute_ms(self, compute: Compute, tokens: float, share_of_bytes: float = 1.0) -> np.ndarray:
        """Computation of all layers in a step: float64 [iteration]."""
        return np.sum([layer.compute_ms(compute, tokens, share_of_bytes) for layer in self.layers], axis=0)

    def step_ms(self, cluster: Cluster, share_of_bytes: float = 1.0) -> np.ndarray:
        """Time of the AlltoAlls of all layers in a step, each under its cheapest scheme: float64 [iteration]."""
        return np.sum([layer.step_ms(cluster, share_of_bytes) for layer in self.layers], axis=0)

    def mean_stages(self, cluster: Cluster) -> dict[Peers, float]:
        """Time that each kind of exchange takes in a step, all layers, mean over iterations."""
        total: dict[Peers, float] = {}
        for layer in self.layers:
            for peers, ms in layer.mean_stages(cluster).items():
                total[peers] = total.get(peers, 0.0) + ms
        return total

    def schemes_used(self, cluster: Cluster) -> list[DispatchScheme]:
        """Those that are the cheapest in some iteration of some layer, by name."""
        used = {scheme.name: scheme for layer in self.layers for scheme in layer.schemes_used(cluster)}
        return [used[name] for name in sorted(used)]

    def dimensions(self, cluster: Cluster) -> dict[int, float]:
        """Share of iterations and layers in which each dimension is the cheapest (d*), by falling share."""
        shares: dict[int, float] = {}
        for layer in self.layers:
            for dimension, share in layer.dimensions(cluster).items():
                shares[dimension] = shares.get(dimension, 0.0) + share / len(self.layers)
        rounded = {dimension: round(share, 12) for dimension, share in shares.items()}
        return dict(sorted(rounded.items(), key=lambda one: -one[1]))

    def crossing(self, cluster: Cluster) -> np.ndarray:
        """Bytes across every level of one AlltoAll of every layer, mean over iterations: float64 [D]."""
        return np.sum([layer.crossing(cluster) for layer in self.layers], axis=0)


def count_held_out(
    case: Case, schemes: tuple[DispatchScheme, ...], placement: Placement, iterations: Sequence[int]
) -> HeldOut:
    """Exact rows of some iterations that a case is judged on, under one placement."""
    hierarchy = case.cluster.hierarchy
    steps = [case.judging.counts(i, placement, hierarchy) for i in iterations]
    busiest, crossing = [], []
    for scheme in schemes:
        traffic = [exact_traffic(scheme, counts, hierarchy) for counts in steps]
        busiest.append(torch.stack([x.busiest_rows() for x in traffic]).numpy())
        crossing.append(torch.stack([crossing_rows(x.rows_SGG, hierarchy) for x in traffic]).numpy())
    expert_rows = np.array([int(counts.pairs_GG.sum(0).max()) for counts in steps])
    return HeldOut(schemes, case.sizes.sent, tuple(busiest), tuple(crossing), expert_rows)


def crossing_rows(rows_SGG: Tensor, hierarchy: Hierarchy) -> Tensor:
    """Rows by the outermost level whose groups they leave, all stages together: int64 [D].

    Args:
        rows_SGG: int64 [stage, source, destination].
        hierarchy: groups of GPUs.
    """
    level_GG = separating_level(hierarchy)  # D + 1 on the diagonal: these rows stay
    total = torch.zeros(hierarchy.depth + 2, dtype=torch.int64)
    return total.index_add_(0, level_GG.view(-1), rows_SGG.sum(0).view(-1))[1:-1]
