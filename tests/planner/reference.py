"""Slow and obvious: what every system sends, token by token, and what a swap would change, recounted from nothing.

Written from the paper's description alone. Nothing here knows of schemes, stages as data, histograms or tensors: a
token is a tuple, a GPU is a number, and rows are counted one at a time. The planner must agree to the row.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

import torch

from hiermoe.routing.step import RoutingStep
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.peers import AlphaBeta
from hiermoe.topology.placement import Placement

Token = tuple[int, tuple[int, ...]]  # the GPU that holds it; its experts by falling score
Rows = list[list[list[int]]]  # [stage][source][destination]


@dataclass(frozen=True)
class Machine:
    """GPUs in nested groups, experts on GPUs.

    Attributes:
        groups: number of groups of every level, outermost first; the last one is the number of GPUs.
        gpu_of: GPU of every expert.
    """

    groups: tuple[int, ...]
    gpu_of: tuple[int, ...]

    @property
    def gpus(self) -> int:
        return self.groups[-1]

    def group_size(self, level: int) -> int:
        return self.gpus if level == 0 else self.gpus // self.groups[level - 1]

    def group(self, gpu: int, level: int) -> int:
        return gpu // self.group_size(level)

    def index_in_group(self, gpu: int, level: int) -> int:
        return gpu % self.group_size(level)

    def member(self, group: int, index: int, level: int) -> int:
        return group * self.group_size(level) + index


@dataclass
class Dispatch:
    """What happened.

    Attributes:
        rows: rows of every stage from GPU to GPU, what stays on its GPU included.
        reached: how often every (token, expert, GPU) was delivered.
        final_rows: how often every (token, GPU) got a row in the last stage.
        dropped: dropped pairs by (source, expert).
    """

    rows: Rows
    reached: Counter[tuple[int, int, int]]
    final_rows: Counter[tuple[int, int]]
    dropped: Counter[tuple[int, int]]


def machine(hierarchy: Hierarchy, placement: Placement) -> Machine:
    per_gpu = placement.num_experts // hierarchy.num_ranks
    return Machine(hierarchy.groups, tuple(slot // per_gpu for slot in placement.slot_E.tolist()))


def on_slots(hierarchy: Hierarchy, placement: Placement, step: RoutingStep) -> tuple[Machine, list[Token]]:
    """Experts that have copies: every slot as an expert of its own, and tokens that name the slots they are for."""
    per_gpu = placement.num_slots // hierarchy.num_ranks
    world = Machine(hierarchy.groups, tuple(slot // per_gpu for slot in range(placement.num_slots)))
    return world, with_slots(placement, tokens_of(step))


def with_slots(placement: Placement, tokens: list[Token]) -> list[Token]:
    """Tokens that name slots where they named experts."""
    assert placement.copy_GE is not None
    copies = placement.copy_GE.tolist()
    quotas = [[0] * placement.num_slots for _ in copies] if placement.quota_GS is None else placement.quota_GS.tolist()
    asked = Counter((source, expert) for source, experts in tokens for expert in experts)
    seen: Counter[tuple[int, int]] = Counter()
    chosen = []
    for source, experts in tokens:
        slots = []
        for expert in experts:
            line = [slot for slot, e in enumerate(placement.expert_at_S.tolist()) if e == expert
                    for _ in range(quotas[source][slot])]  # fmt: skip
            where = Fraction(2 * seen[source, expert] + 1, 2) * len(line) / asked[source, expert]
            slots.append(line[math.floor(where)] if line else copies[source][expert])
            seen[source, expert] += 1
        chosen.append((source, tuple(slots)))
    if placement.gathered_in is None:
        return chosen
    named = zip(tokens, chosen, strict=True)
    return [(source, gathered(placement, source, experts, slots)) for (source, experts), (_, slots) in named]


def gathered(placement: Placement, source: int, experts: tuple[int, ...], named: tuple[int, ...]) -> tuple[int, ...]:
    """Slots of a token that goes to few groups, level by level; ``named`` where that leads to no fewer."""
    hierarchy = placement.gathered_in
    assert hierarchy is not None
    per_gpu, levels = placement.num_slots // hierarchy.num_ranks, range(1, hierarchy.depth + 1)
    occupant = placement.expert_at_S.tolist()
    gpus = {e: {slot // per_gpu for slot, held in enumerate(occupant) if held == e} for e in experts}

    def near(gpu: int, level: int) -> tuple[int, int]:
        shared = sum(gpu // hierarchy.lanes(i) == source // hierarchy.lanes(i) for i in levels[:level])
        size = hierarchy.lanes(level)
        return shared, -((gpu // size - source // size) % hierarchy.U[level])

    for level in levels:
        size = hierarchy.lanes(level)
        groups = {e: {gpu // size for gpu in mine} for e, mine in gpus.items()}
        chosen = {group for mine in groups.values() for group in mine if len(mine) == 1}
        while waiting := [e for e in experts if not groups[e] & chosen]:

            def worth(
                group: int, waiting: list[int] = waiting, size: int = size, level: int = level
            ) -> tuple[int, ...]:
                covered = sum(group in groups[e] for e in waiting)  # noqa: B023
                asked = sum(slot // per_gpu // size == group for slot in named)
                return covered, int(group == source // size), asked, *near(group * size, level)

            chosen.add(max(range(hierarchy.U[level]), key=worth))
        gpus = {e: {gpu for gpu in mine if gpu // size in chosen} for e, mine in gpus.items()}
    slots = []
    for e, wanted in zip(experts, named, strict=True):
        at = wanted // per_gpu
        gpu = max(gpus[e], key=lambda gpu: (gpu == source, gpu == at, *near(gpu, hierarchy.depth)))
        slots.append(
            wanted if gpu == at else min(s for s, held in enumerate(occupant) if (held, s // per_gpu) == (e, gpu))
        )
    found = tuple(slots)
    return found if visited(hierarchy, per_gpu, found) < visited(hierarchy, per_gpu, named) else named


def visited(hierarchy: Hierarchy, per_gpu: int, slots: tuple[int, ...]) -> list[int]:
    """Groups of each level that a token with these slots goes to."""
    return [len({slot // per_gpu // hierarchy.lanes(i) for slot in slots}) for i in range(1, hierarchy.depth + 1)]


def tokens_of(step: RoutingStep) -> list[Token]:
    return [(s, tuple(e)) for s, e in zip(step.source_N.tolist(), step.expert_ids_NK.tolist(), strict=True)]


def _no_rows(stages: int, gpus: int) -> Rows:
    return [[[0] * gpus for _ in range(gpus)] for _ in range(stages)]


def _hop(world: Machine, at: int, target: int, stage: int, dimension: int) -> int:
    """Next GPU of something at ``at`` that is bound for GPU ``target``, in stage 1..d of the d-dimensional AlltoAll."""
    if stage == dimension:
        assert world.group(at, dimension - 1) == world.group(target, dimension - 1), "last stage leaves its group"
        return target
    assert world.group(at, stage - 1) == world.group(target, stage - 1), "inter stage leaves the group above"
    return world.member(world.group(target, stage), world.index_in_group(at, stage), stage)


def walk_pairs(world: Machine, tokens: list[Token], dimension: int) -> Dispatch:
    """Hd, and with d = 1 Megatron's AlltoAll: every (token, expert) walks alone."""
    rows = _no_rows(dimension, world.gpus)
    reached: Counter[tuple[int, int, int]] = Counter()
    final: Counter[tuple[int, int]] = Counter()
    for number, (source, experts) in enumerate(tokens):
        for expert in experts:
            at = source
            for stage in range(1, dimension + 1):
                to = _hop(world, at, world.gpu_of[expert], stage, dimension)
                rows[stage - 1][at][to] += 1
                at = to
            reached[number, expert, at] += 1
            final[number, at] += 1
    return Dispatch(rows, reached, final, Counter())


def walk_tokens(world: Machine, tokens: list[Token], dimension: int) -> Dispatch:
    """HDd: a GPU sends a token that it holds once to each peer that leads to any of the experts it holds it for."""
    rows = _no_rows(dimension, world.gpus)
    held: dict[int, dict[int, set[int]]] = defaultdict(dict)  # GPU -> token -> experts that it is still to reach
    for number, (source, experts) in enumerate(tokens):
        held[source][number] = set(experts)
    for stage in range(1, dimension + 1):
        arrived: dict[int, dict[int, set[int]]] = defaultdict(dict)
        for at, mine in held.items():
            for number, experts in mine.items():
                bound: dict[int, set[int]] = defaultdict(set)
                for expert in experts:
                    bound[_hop(world, at, world.gpu_of[expert], stage, dimension)].add(expert)
                for to, part in bound.items():
                    rows[stage - 1][at][to] += 1
                    assert number not in arrived[to], "two copies of a token met on one GPU"
                    arrived[to][number] = part
        held = arrived
    reached: Counter[tuple[int, int, int]] = Counter()
    final: Counter[tuple[int, int]] = Counter()
    for gpu, mine in held.items():
        for number, experts in mine.items():
            final[number, gpu] += 1
            for expert in experts:
                reached[number, expert, gpu] += 1
    return Dispatch(rows, reached, final, Counter())


def tutel(
    world: Machine, tokens: list[Token], intra_first: bool, experts: int, capacity_factor: float | None = None
) -> Dispatch:
    """Tutel's 2DH over the groups of level 1; with a capacity factor, C rows walk for every (source, expert)."""

    def walk(rows: Rows, source: int, target: int, amount: int) -> None:
        if intra_first:  # own node, the destination's local index
            via = world.member(world.group(source, 1), world.index_in_group(target, 1), 1)
        else:  # the destination's node, own local index
            via = world.member(world.group(target, 1), world.index_in_group(source, 1), 1)
        rows[0][source][via] += amount
        rows[1][via][target] += amount

    rows = _no_rows(2, world.gpus)
    reached: Counter[tuple[int, int, int]] = Counter()
    final: Counter[tuple[int, int]] = Counter()
    if capacity_factor is None:
        for number, (source, chosen) in enumerate(tokens):
            for expert in chosen:
                walk(rows, source, world.gpu_of[expert], 1)
                reached[number, expert, world.gpu_of[expert]] += 1
                final[number, world.gpu_of[expert]] += 1
        return Dispatch(rows, reached, final, Counter())

    topk = len(tokens[0][1]) if tokens else 0
    wanted: Counter[tuple[int, int]] = Counter((source, expert) for source, chosen in tokens for expert in chosen)
    if capacity_factor == 0:
        capacity = max(wanted.values(), default=0)
    else:
        most = max(Counter(source for source, _ in tokens).values(), default=0)
        capacity = topk * int(capacity_factor * math.ceil(most / experts))
    filled: Counter[tuple[int, int]] = Counter()
    dropped: Counter[tuple[int, int]] = Counter()
    for choice in range(topk):  # all first choices before any second one, then by token
        for number, (source, chosen) in enumerate(tokens):
            expert = chosen[choice]
            if filled[source, expert] == capacity:
                dropped[source, expert] += 1
                continue
            filled[source, expert] += 1
            reached[number, expert, world.gpu_of[expert]] += 1
    for source in range(world.gpus):
        for expert in range(experts):
            walk(rows, source, world.gpu_of[expert], capacity)
    return Dispatch(rows, reached, final, dropped)


def distinct_tokens(world: Machine, tokens: list[Token], level: int) -> list[int]:
    """Tokens that need each group of a level."""
    need = [0] * world.groups[level - 1]
    for _, experts in tokens:
        for group in {world.group(world.gpu_of[expert], level) for expert in experts}:
            need[group] += 1
    return need


def maximum(x: list[float], kind: str, gamma: float) -> float:
    """The paper's maximum functions, term by term."""
    peak = max(x)
    if kind == "plain" or peak == 0:
        return peak
    if kind == "smooth":
        return peak * math.fsum((value / peak) ** gamma for value in x) ** (1 / gamma)
    return peak / gamma * math.log(math.fsum(math.exp(gamma * value / peak) for value in x))


def modelled_ms(
    counts: list[list[int]], machine_groups: tuple[int, ...], cluster: Cluster, row_bytes: int, dimension: int,
    kind: str, gamma: float,
) -> float:  # fmt: skip
    """t_d from the distinct tokens of every group: counts[level - 1][group]."""

    def stage(constants: AlphaBeta | None, level: int) -> float:
        assert constants is not None
        lanes = machine_groups[-1] // machine_groups[level - 1]
        share = [count / lanes for count in counts[level - 1]]
        return constants.alpha_ms + constants.beta_ms_per_byte * row_bytes * maximum(share, kind, gamma)

    depth = len(machine_groups)
    if dimension == 1:
        return stage(cluster.world, depth)
    inter = sum(stage(cluster.levels[level - 1].inter, level) for level in range(1, dimension))
    return inter + stage(cluster.levels[dimension - 2].intra, depth)


def counts_after_every_swap(
    hierarchy: Hierarchy, placement: Placement, tokens: list[Token]
) -> dict[tuple[int, int], list[list[int]]]:
    """Recount all groups of all levels after the exchange of every two slots; (0, 0) stands for no swap."""
    occupant = placement.expert_at_S.tolist()
    slots = placement.slot_E.tolist()
    result = {}
    for r, c in [(0, 0), *combinations(range(len(slots)), 2)]:
        swapped = list(slots)
        swapped[occupant[r]], swapped[occupant[c]] = slots[occupant[c]], slots[occupant[r]]
        world = machine(hierarchy, Placement.of_slots(torch.tensor(swapped)))
        result[r, c] = [distinct_tokens(world, tokens, level) for level in range(1, hierarchy.depth + 1)]
    return result
