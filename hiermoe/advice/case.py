"""One question, ready to be computed: routing on the cluster's GPUs, and the sizes of the model."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from hiermoe.analysis.whole_step import Compute
from hiermoe.measure.workload import CachedRouting
from hiermoe.model import LayerSizes
from hiermoe.routing.step import RoutingSource, first_measured, iteration_schedule
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.placement import Placement

Kind = Literal["recorded", "loads", "synthetic"]


@dataclass(frozen=True)
class Case:
    """One question, ready to be computed.

    Attributes:
        name: of the output folder.
        kind: where routing comes from.
        routing_words: the same, as a phrase.
        source: the steps, laid out over the cluster's GPUs.
        judged_on: other steps, which alone count; None: the last of ``source``.
        layer: model layer that they stand for; 0 where there is none.
        cluster: hierarchy and constants.
        model_words: whose sizes these are.
        sizes: of the model's layer.
        tokens_per_rank: T.
        iterations: to walk through.
        share: of the AlltoAlls in the user's step, as stated; None where it is not.
        compute: what a GPU computes in a step, from which the share follows; None where that is not stated.
        notes: what a reader must know about all this, in sentences.
    """

    name: str
    kind: Kind
    routing_words: str
    source: RoutingSource
    judged_on: RoutingSource | None
    layer: int
    cluster: Cluster
    model_words: str
    sizes: LayerSizes
    tokens_per_rank: int
    iterations: int
    share: float | None
    compute: Compute | None
    notes: tuple[str, ...]

    @cached_property
    def routing(self) -> CachedRouting:
        """The steps that placement policies decide from."""
        return CachedRouting(self.source)

    @cached_property
    def judging(self) -> CachedRouting:
        """The steps that count."""
        return self.routing if self.judged_on is None else CachedRouting(self.judged_on)

    @property
    def schedules(self) -> tuple[list[int], list[int]]:
        """Iterations of `routing` to decide from, repeats included, and iterations of `judging` that count."""
        if self.judged_on is None:
            schedule = iteration_schedule(self.iterations, self.source.num_distinct)
            split = first_measured(self.iterations, self.source.num_distinct)
            return schedule[:split], schedule[split:]
        seen, count = self.source.num_distinct, self.judged_on.num_distinct
        assert seen is not None and count is not None  # both are traces
        return [i % seen for i in range(self.iterations)], list(range(min(count, self.iterations)))

    @property
    def first_places(self) -> Placement:
        """Experts before any has moved."""
        return Placement.first(self.sizes.num_experts, self.cluster.hierarchy.num_ranks)


@dataclass(frozen=True)
class Question:
    """What was asked.

    Attributes:
        cases: one, or one for every layer of the whole model.
        words: where routing comes from, all layers together.
        files: that routing comes from.
        num_layers: of the model, MoE or not; None where it is not known.
    """

    cases: tuple[Case, ...]
    words: str
    files: tuple[Path, ...]
    num_layers: int | None
