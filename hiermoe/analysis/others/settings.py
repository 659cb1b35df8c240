"""A published row as a setting of this suite: its cluster, its routing drawn and counted, bytes of a row each way."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch

from hiermoe.analysis.others.measurement_rules import MeasurementRules, RoutingOf, RowRule
from hiermoe.analysis.others.published_rows import Measurement
from hiermoe.model import VALUE_BYTES, WireConfig
from hiermoe.planner.counts import RoutingCounts, count_routing
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.policies.system import SystemConfig
from hiermoe.records.project import TRACES
from hiermoe.routing.resampled import open_resampled
from hiermoe.routing.step import RoutingRequest, RoutingSource, RoutingStep
from hiermoe.routing.synthetic import GroupLimited, Uniform
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import Peers
from hiermoe.topology.placement import Placement
from hiermoe.topology.scaling import scaled

DRAWN_AT_ONCE = 1024  # tokens of a rank; more are drawn piece by piece, which bounds memory
MOST_DRAWN = 4096  # tokens of a rank; more are taken for so many times these
TRACE = str(TRACES / "{trace}_e{num_experts}_{stage}.trace")


@dataclass(frozen=True)
class Setting:
    """What a published row was measured at.

    Attributes:
        cluster: its part that the GPUs are in.
        schemes: how tokens move; the cheapest is used, as in every run.
        routing: which experts they choose.
        request: G, T, E, K and the group limit; of an AlltoAll without experts, E = G, K = 1 and T rows of a GPU.
        row_bytes: of the AlltoAlls that the row's time has.
        group_level: level whose groups a bandwidth's bytes count; 0: a token's choices.
    """

    cluster: Cluster
    schemes: tuple[DispatchScheme, ...]
    routing: RoutingOf
    request: RoutingRequest
    row_bytes: tuple[float, ...]
    group_level: int

    @property
    def counts(self) -> RoutingCounts:
        """Exact counts of the routing."""
        return _counts(self.routing, self.request, self.cluster.hierarchy)

    @property
    def counted_of_a_token(self) -> float:
        """Rows that a bandwidth's bytes count of a token, its own node's or GPU's included: mean over all tokens."""
        counts = self.counts
        rows = counts.tokens[self.group_level - 1] if self.group_level else counts.pairs_GS
        return int(rows.sum()) / int(counts.tokens_G.sum())


def setting_of(row: Measurement, rule: RowRule, rules: MeasurementRules, system: str | None = None) -> Setting:
    """The setting of a row.

    Args:
        row: what was published.
        rule: what it is.
        rules: of all rows.
        system: published name of another system at the same setting; None for the row's own.

    Raises:
        ValueError: sizes are missing or do not fit the cluster.
    """
    assert rule.cluster is not None
    cluster = _cluster(rule.cluster, row.gpus, rules.overlap)
    inside = rule.one_domain or row.nodes == 1
    named = rules.systems[system or row.system]
    schemes = _system(named.inside if inside else named.across).build_schemes(cluster.hierarchy)
    routing, request = _request(row, rule)
    level = cluster.hierarchy.depth if inside else cluster.hierarchy.names.index("node") + 1 if row.hidden else 0
    return Setting(
        cluster=cluster,
        schemes=schemes,
        routing=routing,
        request=request,
        row_bytes=_row_bytes(row, named.choice_bytes, request),
        group_level=0 if rule.counts == "selections" else level,
    )


@cache
def _cluster(name: str, num_ranks: int, overlap: float) -> Cluster:
    return scaled(Cluster.named(name), num_ranks).model_copy(update={"overlap": overlap, "wave_ms": None})


@cache
def _system(name: str) -> SystemConfig:
    return SystemConfig.named(name)


def _request(row: Measurement, rule: RowRule) -> tuple[RoutingOf, RoutingRequest]:
    """Where routing comes from, and its sizes."""
    if row.bytes_per_gpu is not None:
        rows = row.gpus if rule.routing.pattern is None else row.gpus - row.gpus_per_node
        return rule.routing, RoutingRequest("", row.gpus, 1, row.gpus, rows)
    sizes = {"num_experts": row.num_experts, "topk": row.topk, "tokens_per_gpu": row.tokens_per_gpu}
    for name, value in {**sizes, "hidden": row.hidden}.items():
        if value is None:
            raise ValueError(f"id={row.id}: {name} is not stated, so the row's entry needs a reason")
    assert row.num_experts and row.topk and row.tokens_per_gpu
    routing = rule.routing
    limit = re.match(r"(\d+) of (\d+)", row.group_limit or "")
    if limit and routing == RoutingOf():
        routing = RoutingOf(groups=int(limit[2]), of_a_token=int(limit[1]))
    request = RoutingRequest(
        trace=routing.trace or "",
        num_experts=row.num_experts,
        topk=row.topk,
        num_ranks=row.gpus,
        tokens_per_rank=row.tokens_per_gpu,
        num_groups=routing.groups,
        group_topk=routing.of_a_token,
    )
    return routing, request


def _row_bytes(row: Measurement, choice_bytes: int, request: RoutingRequest) -> tuple[float, ...]:
    """Bytes of a row in each AlltoAll of the row's time: dispatch as its dtype says, combine in BF16."""
    if row.bytes_per_gpu is not None:
        return (row.bytes_per_gpu // request.tokens_per_rank,)
    assert row.hidden is not None
    form = "fp8_with_scales" if row.dtype == "fp8" else "bf16"
    wire = WireConfig(dispatch=form, combine="bf16", choice_bytes=choice_bytes)
    sent = wire.row_bytes(row.hidden, VALUE_BYTES["bf16"], request.topk)
    return {"dispatch": (sent.dispatch,), "combine": (sent.combine,)}.get(row.phase, (sent.dispatch, sent.combine))


def _counts(routing: RoutingOf, request: RoutingRequest, hierarchy: Hierarchy) -> RoutingCounts:
    drawn = min(request.tokens_per_rank, MOST_DRAWN)
    times, rest = divmod(request.tokens_per_rank, drawn)
    if rest:
        raise ValueError(f"tokens_per_gpu={request.tokens_per_rank} is above {MOST_DRAWN} and no multiple of it")
    counts = _drawn(routing, replace(request, tokens_per_rank=drawn), hierarchy)
    tokens = tuple(times * of_level for of_level in counts.tokens)
    return RoutingCounts(tokens, times * counts.pairs_GS, times * counts.tokens_G, request.topk)


@lru_cache(maxsize=64)
def _drawn(routing: RoutingOf, request: RoutingRequest, hierarchy: Hierarchy) -> RoutingCounts:
    placement = Placement.first(request.num_experts, request.num_ranks)
    found = [count_routing(step.over_slots(), placement, hierarchy) for step in _steps(routing, request, hierarchy)]
    by_level = zip(*(one.tokens for one in found), strict=True)
    return RoutingCounts(
        tokens=tuple(torch.stack(of_level).sum(0) for of_level in by_level),
        pairs_GS=torch.stack([one.pairs_GS for one in found]).sum(0),
        tokens_G=torch.stack([one.tokens_G for one in found]).sum(0),
        topk=request.topk,
    )


def _steps(routing: RoutingOf, request: RoutingRequest, hierarchy: Hierarchy) -> Iterator[RoutingStep]:
    """Steps that together have the tokens of a request."""
    if request.topk == 1 and request.num_experts == request.num_ranks:
        yield _without_experts(routing, hierarchy)
        return
    pieces, rest = divmod(request.tokens_per_rank, DRAWN_AT_ONCE)
    for iteration, tokens in enumerate([DRAWN_AT_ONCE] * pieces + [rest] * (rest > 0)):
        yield _source(routing, replace(request, tokens_per_rank=tokens)).step(iteration)


@lru_cache(maxsize=8)
def _source(routing: RoutingOf, request: RoutingRequest) -> RoutingSource:
    if routing.trace:
        return open_resampled(request, TRACE, stage="late")
    return Uniform(request) if routing.groups is None else GroupLimited(request, bias_std=0.0)


def _without_experts(routing: RoutingOf, hierarchy: Hierarchy) -> RoutingStep:
    """Every GPU sends equal parts: to all GPUs, to those of other nodes, or all to those of equal lane there."""
    ranks, targets = range(hierarchy.num_ranks), []
    for rank in ranks:
        near = Peers("intra", 1).members(rank, hierarchy) if hierarchy.depth > 1 else tuple(ranks)
        far = [other for other in ranks if other not in near]
        if routing.pattern == "own_rail":
            rail = [other for other in Peers("inter", 1).members(rank, hierarchy) if other != rank]
            far = sorted(rail * (len(far) // len(rail)))
        targets.append(far if routing.pattern else list(ranks))
    source_N = torch.tensor([rank for rank in ranks for _ in targets[rank]])
    ids_NK = torch.tensor([other for of_rank in targets for other in of_rank])[:, None]
    return RoutingStep(ids_NK, source_N, hierarchy.num_ranks, hierarchy.num_ranks)
