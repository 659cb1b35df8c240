"""What a run consists of, whatever its backend: a system, a cluster, a model's sizes, and routing."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from hiermoe.planner.counts import RoutingCounts, count_routing
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.policies.protocol import PlacementPolicy
from hiermoe.policies.system import SystemConfig
from hiermoe.routing.step import RoutingSource, RoutingStep
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

KEPT_STEP_BYTES = 2**28
KEPT_COUNT_BYTES = 2**30  # all iterations of 16 groups of 256 GPUs


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

    Where expert-parallel groups hold replicas of the experts, group r of iteration i takes step i * replicas + r of the
    source. Counts are kept too: systems with fixed experts share them, and what an update saved needs them again.

    Attributes:
        replicas: expert-parallel groups.
        num_distinct: of the source, for all groups together.
    """

    def __init__(self, source: RoutingSource, replicas: int = 1) -> None:
        """Wrap a source."""
        self.replicas = replicas
        self.num_distinct = None if source.num_distinct is None else source.num_distinct // replicas
        self._source = source
        self._steps = Kept[int, RoutingStep](
            lambda step: step.expert_ids_NK.nbytes + step.source_N.nbytes, KEPT_STEP_BYTES
        )
        self._counts = Kept[tuple[int, bytes, Hierarchy], RoutingCounts](
            lambda counts: sum(x.nbytes for x in (*counts.tokens, counts.pairs_GS, counts.tokens_G)),
            KEPT_COUNT_BYTES,
        )

    def step(self, iteration: int, replica: int = 0) -> RoutingStep:
        """Routing of one group in one iteration."""
        index = iteration * self.replicas + replica
        return self._steps.get(index, lambda: self._source.step(index))

    def counts(self, iteration: int, placement: Placement, hierarchy: Hierarchy, replica: int = 0) -> RoutingCounts:
        """Counts of a step under a placement."""
        key = (iteration * self.replicas + replica, placement.key, hierarchy)
        return self._counts.get(key, lambda: count_routing(self.step(iteration, replica), placement, hierarchy))


class Kept(Generic[K, V]):
    """The values that were asked for last, within a budget of bytes; always at least the last one."""

    def __init__(self, size: Callable[[V], int], budget_bytes: int) -> None:
        """Start empty; ``size`` gives the bytes of a value."""
        self._size, self._left = size, budget_bytes
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key, made if it is not there (any longer)."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = make()
        self._left -= self._size(value)
        while self._left < 0 and len(self._values) > 1:
            self._left += self._size(self._values.popitem(last=False)[1])
        return value
