"""What a run consists of, whatever its backend: a system, a cluster, a model's sizes, and routing."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from hiermoe.planner.counts import RoutingCounts, count_routing
from hiermoe.planner.policy import PlacementPolicy
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.planner.system import SystemConfig
from hiermoe.routing.step import RoutingSource, RoutingStep
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement


@dataclass(frozen=True)
class Workload:
    """A run, ready to be walked through.

    Attributes:
        system: what runs.
        schemes: candidates; the cheapest is used in every step.
        new_policy: makes a placement policy for one layer.
        cluster: hierarchy and constants.
        routing: where steps come from.
        layer: model layer that the routing stands for.
        num_experts: E.
        topk: K.
        row_bytes: M * v.
        element_bytes: v.
        expert_parameters: of one expert.
        iterations: to walk through.
    """

    system: SystemConfig
    schemes: tuple[DispatchScheme, ...]
    new_policy: Callable[[], PlacementPolicy]
    cluster: Cluster
    routing: "CachedRouting"
    layer: int
    num_experts: int
    topk: int
    row_bytes: int
    element_bytes: int
    expert_parameters: int
    iterations: int


class CachedRouting:
    """A routing source that keeps what it made: many systems walk through the same steps.

    Also keeps the counts under the identity placement, which all systems with fixed experts share.
    """

    def __init__(self, source: RoutingSource) -> None:
        """Wrap a source."""
        self.num_distinct = source.num_distinct
        self.step: Callable[[int], RoutingStep] = lru_cache(maxsize=256)(source.step)
        self._identity_counts = lru_cache(maxsize=256)(self._count_identity)

    def counts(self, iteration: int, placement: Placement, hierarchy: Hierarchy) -> RoutingCounts:
        """Counts of a step under a placement."""
        if placement.is_identity:
            return self._identity_counts(iteration, hierarchy)
        return count_routing(self.step(iteration), placement, hierarchy)

    def _count_identity(self, iteration: int, hierarchy: Hierarchy) -> RoutingCounts:
        step = self.step(iteration)
        return count_routing(step, Placement.identity(step.num_experts), hierarchy)
