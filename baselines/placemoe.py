"""PlaceMoE's copies (pia7a/PlaceMoE), written from a description of them.

A few slots more on every GPU hold second copies that train like the first: they keep training state, their gradients
are summed to all. Every ``layout_interval`` steps experts are laid out anew, every ``mapping_interval`` steps a table
says which copy each source GPU uses: jobs (source, expert) by falling demand, to a copy in their node if there is one,
the least loaded; then sweeps that maximise affinity, the tokens of a job that other experts bring to that node and to
that GPU already, less the load of the busiest GPU. Candidates are judged by replaying routes of the last steps:
4 times the deduplicated communication, 3 times the computation of the busiest GPU.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from baselines.choices_of_copies import evenly_among_nearest
from baselines.eplb import balanced
from baselines.guests import check_spare, domain_level
from hiermoe.planner.cost import time_by_groups
from hiermoe.planner.counts import sort_choices
from hiermoe.planner.token_sets import TokenSets
from hiermoe.policies.protocol import CopyTerms, PlacementPolicy, PlacementUpdate, StepContext
from hiermoe.policies.search.sketch import Sketch
from hiermoe.routing.step import num_slots
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement

_TENSORS = ("ids_NK", "weight_N", "step_N", "tokens_S")  # of remembered routes


@dataclass(frozen=True)
class Demand:
    """What sources ask for.

    Attributes:
        tokens_GE: int64 [G, E], tokens of each source for each expert.
        together_GEE: float64 [G, E, E], of them those that choose another expert too; 0 on the diagonal.
    """

    tokens_GE: np.ndarray
    together_GEE: np.ndarray

    @classmethod
    def of(cls, routes: TokenSets, experts: int, ranks: int) -> "Demand":
        """Of captured routes: E experts, then the source as number E + g."""
        ids_NK, source_N = routes.ids_NK[:, :-1], routes.ids_NK[:, -1] - experts
        weight_N, topk = routes.weight_N.double(), routes.ids_NK.shape[1] - 1
        asked_NK = source_N[:, None] * experts + ids_NK
        pair_NKK = asked_NK[:, :, None] * experts + ids_NK[:, None, :]
        weights = weight_N.repeat_interleave(topk * topk)
        together = torch.bincount(pair_NKK.view(-1), weights, ranks * experts * experts).view(ranks, experts, experts)
        tokens_GE = together.diagonal(dim1=1, dim2=2).clone()
        together.diagonal(dim1=1, dim2=2).zero_()
        return cls(tokens_GE.long().numpy(), together.numpy())


@dataclass(frozen=True)
class Weights:
    """What a copy is chosen by, in tokens.

    Attributes:
        node: omega_node, of the affinity to the copy's node.
        rank: omega_rank, of the affinity to its GPU.
        load: gamma, of the busiest GPU's load.
    """

    node: float
    rank: float
    load: float


class PlaceMoEPolicy(PlacementPolicy):
    """Copies that train, laid out and mapped to sources by replayed routes."""

    def __init__(
        self,
        spare: int = 2,
        layout_interval: int = 20,
        mapping_interval: int = 4,
        window: int = 16,
        sweeps: int = 2,
        node_weight: float = 1.0,
        rank_weight: float = 1.0,
        load_weight: float = 1.0,
        tflops: float = 100.0,
        cells: int = 8192,
        gradient_bytes: int = 2,
    ) -> None:
        """Set the policy up for one layer.

        Args:
            spare: slots a GPU beyond its own experts.
            layout_interval: L, steps between layouts.
            mapping_interval: M, steps between mappings.
            window: steps whose routes are remembered.
            sweeps: over all jobs that have a choice.
            node_weight: omega_node.
            rank_weight: omega_rank.
            load_weight: gamma.
            tflops: what a GPU computes with, 10^12 operations a second.
            cells: of the sketch that captures routes, a power of two.
            gradient_bytes: of a parameter.

        Raises:
            ValueError: no slot, a number below 1, a weight below 0, a rate that is not positive, cells that are no
                power of two, or another number of bytes.
        """
        check_spare(spare)
        if min(layout_interval, mapping_interval, window) < 1 or sweeps < 0:
            raise ValueError(
                f"layout_interval={layout_interval}, mapping_interval={mapping_interval}, window={window}: all must be "
                f"at least 1, and sweeps={sweeps} at least 0"
            )
        if min(node_weight, rank_weight, load_weight) < 0 or tflops <= 0:
            weights = f"node_weight={node_weight}, rank_weight={rank_weight}, load_weight={load_weight}"
            raise ValueError(f"{weights} must be at least 0, and tflops={tflops} positive")
        self.spare, self.window, self.sweeps, self.tflops = spare, window, sweeps, tflops
        self.layout_interval, self.mapping_interval = layout_interval, mapping_interval
        self.weights = Weights(node_weight, rank_weight, load_weight)
        self.copies = CopyTerms(shared_buffers=False, gradient_bytes=gradient_bytes, with_state=True)
        self._sketch = Sketch(cells)
        self._remembered: list[TokenSets] = []  # of one step each, the latest last

    def measure(
        self, expert_ids_NK: Tensor, source_N: Tensor, placement: Placement, hierarchy: Hierarchy, iteration: int
    ) -> Tensor | None:
        """A sketch of the routes: a token's experts, and its source as one number more."""
        return self._sketch.measure(torch.cat([expert_ids_NK, source_N[:, None] + placement.num_experts], 1))

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        """Where an interval ends, the best layout or mapping for the routes of the last steps."""
        assert summed is not None
        hierarchy, experts = context.cluster.hierarchy, placement.num_experts
        step = self._sketch.read(summed, experts + hierarchy.num_ranks)
        self._sketch = self._sketch.adapted(summed)
        if step.tokens:  # none where every cell has collisions
            self._remembered = [*self._remembered, step][-self.window :]
        lays_out = (context.iteration + 1) % self.layout_interval == 0
        maps = placement.has_copies and (context.iteration + 1) % self.mapping_interval == 0
        if not self._remembered or not (lays_out or maps):
            return None
        routes = TokenSets.joined(self._remembered)
        demand = Demand.of(routes, experts, hierarchy.num_ranks)
        layouts = [placement.expert_at_S] if placement.has_copies else []
        if lays_out:
            ranks, load_E = hierarchy.num_ranks, demand.tokens_GE.sum(0)
            slots = num_slots(experts, ranks) + self.spare * ranks
            layouts.append(by_demand(demand.tokens_GE, placement, slots, hierarchy))
            layouts.append(torch.tensor(balanced(load_E.tolist(), slots, 1, 1, ranks)))
        candidates = [placement] + [
            Placement(layout, mapped(layout, demand, hierarchy, self.weights, self.sweeps)) for layout in layouts
        ]
        best = min(candidates, key=lambda one: replayed_ms(routes, one, context, self.tflops))
        return None if best is placement else PlacementUpdate(best, None)

    def state_dict(self) -> dict[str, Tensor]:
        """Remembered routes, and the sketch's size."""
        state = {"zero_bits": torch.tensor(self._sketch.zero_bits)}
        if self._remembered:
            routes = TokenSets.joined(self._remembered)
            state |= {name: getattr(routes, name) for name in _TENSORS}
            state["numbers"] = torch.tensor(routes.num_experts)
        return state

    def shared_state(self) -> dict[str, Tensor]:
        """The sketch's size: one rank decides, and it alone remembers routes."""
        return {"zero_bits": torch.tensor(self._sketch.zero_bits)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: the state of another policy.
        """
        known = {"zero_bits", "numbers", *_TENSORS}
        if state.keys() - known or "zero_bits" not in state:
            raise ValueError(f"PlaceMoEPolicy remembers {', '.join(sorted(known))}; the state has {', '.join(state)}")
        self._sketch = replace(self._sketch, zero_bits=int(state["zero_bits"]))
        self._remembered = []
        if "numbers" in state:
            tensors = {name: state[name] for name in _TENSORS}
            self._remembered = TokenSets(**tensors, num_experts=int(state["numbers"])).by_step()


class TwoFixedCopiesPolicy(PlacementPolicy):
    """PlaceMoE's copies without its planning: a second copy of every expert half of all GPUs away, for ever.

    Sources use the nearest copy, evenly where both are as near.
    """

    def __init__(self, gradient_bytes: int = 2) -> None:
        """Set the policy up for one layer.

        Args:
            gradient_bytes: of a parameter.

        Raises:
            ValueError: another number of bytes.
        """
        self.copies = CopyTerms(shared_buffers=False, gradient_bytes=gradient_bytes, with_state=True)

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        """The copies, once."""
        ranks = context.cluster.hierarchy.num_ranks
        if placement.has_copies or ranks == 1:
            return None
        own_RS = placement.expert_at_S.view(ranks, -1)
        layout = torch.cat([own_RS, own_RS.roll(-(ranks // 2), 0)], 1).reshape(-1)
        return PlacementUpdate(evenly_among_nearest(layout, context.cluster.hierarchy), None)


def by_demand(tokens_GE: np.ndarray, placement: Placement, slots: int, hierarchy: Hierarchy) -> Tensor:
    """Expert in each slot: first copies stay on their GPU, other slots hold what their own node asks for most.

    In every node experts without a first copy there, by falling demand of the node's sources, go one by one to the GPU
    that has a free slot and got the least demand so far. A slot that is left holds its GPU's first expert again, or
    expert 0.

    Args:
        tokens_GE: int64 [G, E], demand.
        placement: the lowest slot of an expert holds its first copy.
        slots: in all; GPUs have equally many, and room for the first copies that they have.
        hierarchy: nodes are its NVLink domains.
    """
    ranks, experts = tokens_GE.shape
    lanes = hierarchy.lanes(domain_level(hierarchy))
    first_E = np.unique(placement.expert_at_S.numpy(), return_index=True)[1]
    held: list[list[int]] = [[] for _ in range(ranks)]
    for slot in np.sort(first_E).tolist():
        held[slot // placement.per_rank(ranks)].append(int(placement.expert_at_S[slot]))
    for first in range(0, ranks, lanes):
        node = range(first, first + lanes)
        here = {expert for rank in node for expert in held[rank]}
        asked_E, got = tokens_GE[first : first + lanes].sum(0).tolist(), dict.fromkeys(node, 0)
        for expert in sorted(set(range(experts)) - here, key=lambda e: (-asked_E[e], e)):
            free = [rank for rank in node if len(held[rank]) < slots // ranks]
            if not free:
                break
            rank = min(free, key=lambda rank: got[rank])
            held[rank].append(expert)
            got[rank] += asked_E[expert]
        for rank in node:
            held[rank] += (held[rank] or [0])[:1] * (slots // ranks - len(held[rank]))
    return torch.tensor([expert for mine in held for expert in mine])


def mapped(layout_S: Tensor, demand: Demand, hierarchy: Hierarchy, weights: Weights, sweeps: int) -> Tensor:
    """Slot of the copy that each source uses of each expert: int64 [G, E].

    Args:
        layout_S: int64 [S], expert in each slot.
        demand: of the sources.
        hierarchy: nodes are its NVLink domains.
        weights: of the sweeps.
        sweeps: over all jobs with a choice.
    """
    ranks, experts = demand.tokens_GE.shape
    lanes, per_rank = hierarchy.lanes(domain_level(hierarchy)), len(layout_S) // ranks
    copies: list[list[int]] = [[] for _ in range(experts)]
    for slot, expert in enumerate(layout_S.tolist()):
        copies[expert].append(slot)
    near_NE = [
        [[slot for slot in mine if slot // per_rank // lanes == node] or mine for mine in copies]
        for node in range(ranks // lanes)
    ]
    jobs = np.argsort(-demand.tokens_GE.reshape(-1), kind="stable").tolist()
    tokens = demand.tokens_GE.reshape(-1).tolist()
    load, slot_C = [0] * ranks, [0] * len(jobs)
    for job in jobs:
        source, expert = divmod(job, experts)
        near = near_NE[source // lanes][expert]
        slot_C[job] = min(near, key=lambda slot: load[slot // per_rank]) if len(near) > 1 else near[0]
        load[slot_C[job] // per_rank] += tokens[job]
    at_C, load_R = np.array(slot_C) // per_rank, np.array(load)
    rank_of, together_CE = [np.array(slots) // per_rank for slots in copies], demand.together_GEE.reshape(-1, experts)
    open_jobs = [job for job in jobs if tokens[job] and len(copies[job % experts]) > 1]
    for _ in range(sweeps):
        for job in open_jobs:
            source, expert = divmod(job, experts)
            mine = rank_of[expert]
            load_R[at_C[job]] -= tokens[job]
            there = at_C[source * experts : (source + 1) * experts]
            rank_affinity = np.bincount(there, together_CE[job], ranks)
            node_affinity = rank_affinity.reshape(-1, lanes).sum(1)
            peak = np.maximum(load_R.max(), load_R[mine] + tokens[job])
            score = weights.node * node_affinity[mine // lanes] + weights.rank * rank_affinity[mine]
            best = int(np.argmax(score - weights.load * peak))
            at_C[job], slot_C[job] = mine[best], copies[expert][best]
            load_R[mine[best]] += tokens[job]
    return torch.tensor(slot_C).view(ranks, experts)


def replayed_ms(routes: TokenSets, placement: Placement, context: StepContext, tflops: float) -> float:
    """4 times one deduplicated exchange, 3 times the computation of the busiest GPU, mean over steps.

    Args:
        routes: of some steps; E experts, then the source as number E + g.
        placement: to judge.
        context: scheme, constants and sizes.
        tflops: what a GPU computes with.
    """
    hierarchy, steps = context.cluster.hierarchy, routes.num_steps
    ranks, weight_N = hierarchy.num_ranks, routes.weight_N.double()
    source_N = routes.ids_NK[:, -1] - placement.num_experts
    choices = sort_choices(routes.ids_NK[:, :-1], placement, hierarchy, source_N)
    sampled_S = torch.bincount(routes.step_N, weight_N, steps)
    scale_S = routes.tokens_S / sampled_S.clamp(min=1.0)
    needed = [x_SU.amax(1) * scale_S for x_SU in choices.distinct(routes.step_N, steps, hierarchy, weight_N)]
    comm_S = time_by_groups(context.scheme, lambda level: needed[level - 1], context.cluster, context.row_bytes)
    code_NK = routes.step_N[:, None] * ranks + choices.rank_NK
    weights = weight_N.repeat_interleave(code_NK.shape[1])
    rows_SR = torch.bincount(code_NK.view(-1), weights, steps * ranks).view(steps, ranks)
    compute_S = rows_SR.amax(1) * scale_S * (2 * context.expert_parameters / (tflops * 1e9))
    return float((4 * torch.as_tensor(comm_S) + 3 * compute_S).mean())
