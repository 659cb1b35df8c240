"""What a run consists of, wherever it happens: a system, a cluster, a layer's sizes, and routing."""

import json
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Generic, TypeVar

import pandas as pd
from torch import Tensor

from hiermoe.measure.measurement import Measurement
from hiermoe.model import LayerSizes
from hiermoe.planner.cost import check_overlap
from hiermoe.planner.counts import RoutingCounts, count_routing
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.policies.protocol import PlacementPolicy
from hiermoe.policies.system import SystemConfig, build
from hiermoe.ranks.world import Progress, Source
from hiermoe.records.status import NotApplicable
from hiermoe.routing.resampled import Resampled
from hiermoe.routing.step import (
    RoutingRequest,
    RoutingSource,
    RoutingStep,
    first_measured,
    iteration_schedule,
    num_slots,
)
from hiermoe.routing.trace import RecordedRouting
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

KEPT_STEP_BYTES = 2**28
KEPT_COUNT_BYTES = 2**30  # all iterations of 16 groups of 256 GPUs
KEPT_MEASURED_BYTES = 2**28


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
        sizes: of the layer.
        iterations: to walk through.
    """

    system: SystemConfig
    schemes: tuple[DispatchScheme, ...]
    new_policy: Callable[[], PlacementPolicy]
    cluster: Cluster
    routing: "CachedRouting"
    layer: int
    sizes: LayerSizes
    iterations: int

    @property
    def first_places(self) -> Placement:
        """Experts before any has moved."""
        return Placement.first(self.sizes.num_experts, self.cluster.hierarchy.num_ranks)

    @cached_property
    def schedule(self) -> list[int]:
        """The routing's iteration for every iteration of the run."""
        return iteration_schedule(self.iterations, self.routing.num_distinct)

    @cached_property
    def measured_from(self) -> int:
        """First iteration that counts."""
        return first_measured(self.iterations, self.routing.num_distinct)


def open_workload(config: Any) -> Workload:
    """Build what the configuration of a run names, and open its routing.

    Raises:
        NotApplicable: the combination has no meaning or no data.
        ValueError: sizes that do not fit.
    """
    num_slots(config.sizes.num_experts, config.cluster.hierarchy.num_ranks)  # or some GPUs have no expert
    schemes = config.system.build_schemes(config.cluster.hierarchy)
    for scheme in schemes:
        check_overlap(scheme, config.cluster)
    routing, layer = open_routing(json.dumps(config.routing_source), config.request, config.ep_groups)
    config.system.build_policy()  # bad arguments end the run here, not in its middle
    return Workload(
        system=config.system,
        schemes=schemes,
        new_policy=config.system.build_policy,
        cluster=config.cluster,
        routing=routing,
        layer=layer,
        sizes=config.sizes,
        iterations=config.iterations,
    )


class OfWorkloads(Measurement):
    """A function that measures a workload, without any ranks."""

    def __init__(self, function: Callable[[Workload, Progress], pd.DataFrame], source: Source) -> None:
        """Take the function, and what records say of how its numbers came to be."""
        self._function, self.source = function, source

    @property
    def module(self) -> str:
        """The function's."""
        return self._function.__module__

    def prepare(self, config: Any) -> Workload:
        """Everything built and open."""
        return open_workload(config)

    def measure_one(self, job: Workload, world: None, progress: Progress) -> pd.DataFrame:
        """Call it."""
        return self._function(job, progress)


@lru_cache(maxsize=2)  # runs come grouped by routing; two keep a model's E and K neighbours without filling memory
def open_routing(source: str, request: RoutingRequest, ep_groups: int) -> tuple["CachedRouting", int]:
    """The routing source and the model layer that it stands for (0 for synthetic routing)."""
    opened = build(json.loads(source), request=request)
    layer = opened.trace.metadata.layers[opened.layer] if isinstance(opened, RecordedRouting | Resampled) else 0
    routing = CachedRouting(opened, ep_groups)
    if routing.num_distinct is not None and routing.num_distinct < 2:
        raise NotApplicable(
            f"the trace lasts for {routing.num_distinct} iterations of {ep_groups} groups of {request.num_ranks} ranks "
            f"with {request.tokens_per_rank} tokens each; a run takes at least 2 (routing=resampled has no end)"
        )
    return routing, layer


class CachedRouting:
    """A routing source that keeps what it made: many systems walk through the same steps.

    Where expert-parallel groups hold all experts each, group r of iteration i takes step i * ep_groups + r of the
    source. Counts are kept too: systems with fixed experts share them, and what an update saved needs them again. So is
    what policies measure that differ only in how they decide: they go the same way for many steps.

    Attributes:
        ep_groups: expert-parallel groups.
        num_distinct: of the source, for all groups together.
    """

    def __init__(self, source: RoutingSource, ep_groups: int = 1) -> None:
        """Wrap a source."""
        self.ep_groups = ep_groups
        self.num_distinct = None if source.num_distinct is None else source.num_distinct // ep_groups
        self._source = source
        self._steps = Kept[int, RoutingStep](
            lambda step: step.expert_ids_NK.nbytes + step.source_N.nbytes, KEPT_STEP_BYTES
        )
        self._counts = Kept[tuple[int, bytes, Hierarchy], RoutingCounts](
            lambda counts: sum(x.nbytes for x in (*counts.tokens, counts.pairs_GS, counts.tokens_G)),
            KEPT_COUNT_BYTES,
        )
        self._measured = Kept[Hashable, Tensor | None](
            lambda measured: 0 if measured is None else measured.nbytes, KEPT_MEASURED_BYTES
        )

    def step(self, iteration: int, group: int = 0) -> RoutingStep:
        """Routing of one group in one iteration."""
        index = iteration * self.ep_groups + group
        return self._steps.get(index, lambda: self._source.step(index).over_slots())

    def counts(self, iteration: int, placement: Placement, hierarchy: Hierarchy, group: int = 0) -> RoutingCounts:
        """Counts of a step under a placement."""
        key = (iteration * self.ep_groups + group, placement.key, hierarchy)
        return self._counts.get(key, lambda: count_routing(self.step(iteration, group), placement, hierarchy))

    def measured(
        self,
        policy: PlacementPolicy,
        run_iteration: int,
        iteration: int,
        placement: Placement,
        hierarchy: Hierarchy,
        group: int = 0,
    ) -> Tensor | None:
        """What a policy measures of a step under a placement, in an iteration of its run."""

        def measure() -> Tensor | None:
            step = self.step(iteration, group)
            return policy.measure(step.expert_ids_NK, step.source_N, placement, hierarchy, run_iteration)

        if policy.measures_alike is None:
            return measure()
        where = (run_iteration, iteration * self.ep_groups + group, placement.key, hierarchy)
        return self._measured.get((policy.measures_alike, where), measure)


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
