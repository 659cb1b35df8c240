"""The plan of one layer's dispatch in one micro-batch: made once from the routing, then only replayed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from hiermoe.dispatch.communicators import Communicator, Communicators
from hiermoe.dispatch.interposer import staged
from hiermoe.dispatch.rows import RowCopies, counted
from hiermoe.model import RowBytes
from hiermoe.planner.cost import choose_scheme
from hiermoe.planner.counts import RoutingCounts
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.planner.traffic import Traffic, expert_capacity, pair_traffic
from hiermoe.routing.step import experts_per_rank
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.fewest_groups import FewestGroups
from hiermoe.topology.placement import Placement
from hiermoe.topology.quotas import Shares

# What a rank chooses slots by. Copied to a GPU once: the host waits for that.
_SLOTS_ON_DEVICE: WeakKeyDictionary[Placement, dict[tuple[int, torch.device], "_Choice"]] = WeakKeyDictionary()
_FIRST_OF_ROW = -(2**15)  # sign bit of a slot's number in the metadata: a new row starts here


@dataclass(frozen=True)
class StagePlan:
    """One exchange of one rank.

    Attributes:
        name: ``1:inter1``.
        communicator: who exchanges.
        copies: from the rows held before the stage to the rows sent, grouped by receiver.
        send_rows: rows to every member.
        receive_rows: rows from every member.
        pair_order_P: int64 [P], token-expert pairs held before the stage in the order in which they are sent.
        send_pairs: pairs to every member.
        receive_pairs: pairs from every member.
    """

    name: str
    communicator: Communicator
    copies: RowCopies
    send_rows: list[int]
    receive_rows: list[int]
    pair_order_P: Tensor
    send_pairs: list[int]
    receive_pairs: list[int]


@dataclass(frozen=True)
class DispatchPlan:
    """Scheme, placement and splits of one dispatch. Combine, backward and recomputation replay it and decide nothing.

    Attributes:
        scheme: what was chosen (HDd* of the step).
        traffic: rows of all ranks, stage by stage.
        counts: the routing of all ranks under the placement, as numbers of tokens and pairs.
        stages: this rank's exchanges.
        expand: from the rows that arrived to one row per (token, local expert), by expert.
        rows_per_slot: int64 [S / G] on the CPU, padding included.
        by_expert_P: int64 [P], arrived pairs in the order of the expanded rows.
        weights_P: routing weight of every expanded row.
        pair_index_P: int64 [P], flat index into the [T, K] choices of every pair that this rank sends; T * K: padding.
        ids_TK: what was routed, to recognise a recomputation.
    """

    scheme: DispatchScheme
    traffic: Traffic
    counts: RoutingCounts
    stages: tuple[StagePlan, ...]
    expand: RowCopies
    rows_per_slot: Tensor
    by_expert_P: Tensor
    weights_P: Tensor
    pair_index_P: Tensor
    ids_TK: Tensor

    @property
    def kept_TK(self) -> Tensor:
        """Which of this rank's pairs travelled, bool [T, K]: a lossy scheme drops some."""
        kept = self.ids_TK.new_zeros(self.ids_TK.numel() + 1, dtype=torch.bool)
        kept[self.pair_index_P] = True
        return kept[:-1].view_as(self.ids_TK)


@dataclass(frozen=True)
class DispatchContext:
    """What all plans of a layer have in common.

    Attributes:
        schemes: candidates; the cheapest on the micro-batch's own routing is used (Algorithm 1).
        cluster: alpha and beta.
        communicators: of this rank.
    """

    schemes: Sequence[DispatchScheme]
    cluster: Cluster
    communicators: Communicators


@dataclass(frozen=True)
class _Pairs:
    """Token-expert pairs on one rank, those of a row side by side and by rising slot.

    Attributes:
        row_P: int64 [P], row of each pair among the rows that the rank holds; ``num_rows`` for padding.
        slot_P: int64 [P], slot of its expert.
        weight_P: [P], its routing weight.
        num_rows: rows held.
    """

    row_P: Tensor
    slot_P: Tensor
    weight_P: Tensor
    num_rows: int


def make_plan(
    ids_TK: Tensor, weights_TK: Tensor, placement: Placement, context: DispatchContext, row_bytes: int
) -> DispatchPlan:
    """Exchange counts, choose the scheme, and tell every rank which experts its rows are for.

    *Collective: every rank of the expert-parallel group must call it.* The numbers of tokens and pairs are gathered
    once; splits of every stage follow from them on every rank by the planner's arithmetic. The metadata of a stage is
    two bytes and the routing weight for every pair. A host waits for its GPU once, for these numbers: all other sizes
    follow from them.

    Args:
        ids_TK: int64 [T, K], the different (logical) experts of each token in any order; -1: none.
        weights_TK: [T, K], their routing weights.
        placement: where experts sit, and which copy tokens of this rank use.
        context: of the layer.
        row_bytes: M * v, for the choice of the scheme.
    """
    hierarchy, communicators = context.cluster.hierarchy, context.communicators
    per_rank = experts_per_rank(placement.num_slots, hierarchy.num_ranks)
    with torch.no_grad():
        slot_TK, choice_TK = _chosen_slots(ids_TK, placement, communicators.rank)
        counts = _gather_counts(slot_TK, placement.num_slots, context)
        chosen = choose_scheme(context.schemes, counts, context.cluster, RowBytes.alike(row_bytes))
        scheme = chosen.scheme
        num_pairs = num_kept = int(counts.pairs_GS[communicators.rank].sum())
        pairs, index_P = _local_pairs(slot_TK, choice_TK, weights_TK, placement.num_slots, num_pairs)
        rows_per_slot = counts.pairs_GS.sum(0).view(hierarchy.num_ranks, per_rank)[communicators.rank]
        all_used = num_pairs == ids_TK.numel()  # every row has a pair; after the first stage always
        if scheme.padding:
            capacity = expert_capacity(scheme.padding, counts)
            pairs, index_P = _padded(pairs, index_P, placement.num_slots, capacity, no_pair=ids_TK.numel())
            rows_per_slot = torch.full((per_rank,), capacity * hierarchy.num_ranks)
            num_kept = int(counts.pairs_GS[communicators.rank].clamp(max=capacity).sum())
        rows_SGG = chosen.traffic.rows_SGG.tolist()
        pairs_SGG = pair_traffic(scheme, counts, hierarchy).tolist()
        stages = []
        for index, (name, stage) in enumerate(zip(scheme.stage_names, scheme.stages, strict=True)):
            communicator = communicators.of(stage.peers)
            me, members = communicators.rank, communicator.members
            peer_P = stage.peers.position(pairs.slot_P // per_rank, hierarchy)
            order_P = torch.argsort(peer_P, stable=True)
            starts_P = torch.ones_like(order_P, dtype=torch.bool)
            if stage.rows == "token":  # else every pair is a row of its own
                starts_P[1:] = (pairs.row_P[1:] != pairs.row_P[:-1]) | (peer_P[1:] != peer_P[:-1])
            is_first_P = starts_P[order_P]
            send = [rows_SGG[index][me][peer] for peer in members]
            source_R = pairs.row_P[order_P][torch.nonzero_static(is_first_P, size=sum(send)).view(-1)]
            padding = len(source_R) - num_kept if scheme.padding and index == 0 else 0
            plan = StagePlan(
                name=name,
                communicator=communicator,
                copies=RowCopies.of(source_R, pairs.num_rows, padding, all_used and not scheme.padding),
                send_rows=send,
                receive_rows=[rows_SGG[index][peer][me] for peer in members],
                pair_order_P=order_P,
                send_pairs=[pairs_SGG[index][me][peer] for peer in members],
                receive_pairs=[pairs_SGG[index][peer][me] for peer in members],
            )
            with staged(name):
                pairs = _exchange_pairs(pairs, order_P, is_first_P, plan)
            all_used = True
            stages.append(plan)
        local_P = pairs.slot_P - communicators.rank * per_rank
        by_expert_P = torch.argsort(local_P, stable=True)
        return DispatchPlan(
            scheme=scheme,
            traffic=chosen.traffic,
            counts=counts,
            stages=tuple(stages),
            expand=RowCopies.of(pairs.row_P[by_expert_P], pairs.num_rows, all_used=all_used),
            rows_per_slot=rows_per_slot,
            by_expert_P=by_expert_P,
            weights_P=pairs.weight_P[by_expert_P],
            pair_index_P=index_P,
            ids_TK=ids_TK,
        )


@dataclass(frozen=True)
class _Choice:
    """What a rank chooses slots by, on a device.

    Attributes:
        slots: int64 [E], slot of every expert, or shares of its copies.
        fewest_groups: by which tokens leave that; None: they do not.
    """

    slots: Tensor | Shares
    fewest_groups: FewestGroups | None

    @classmethod
    def of(cls, placement: Placement, rank: int, device: torch.device) -> "_Choice":
        """A rank's."""
        shares, fewest_groups, experts = placement.shares, placement.fewest_groups, placement.num_experts
        if shares is not None:
            slots = shares.of_source(rank, experts, device)
        elif placement.copy_GE is not None:
            slots = placement.copy_GE[rank].to(device)
        else:
            slots = placement.slot_E.to(device)
        return cls(slots, None if fewest_groups is None else fewest_groups.to(device))


def _chosen_slots(ids_TK: Tensor, placement: Placement, rank: int) -> tuple[Tensor, Tensor]:
    """Slots of a token's experts, rising, S for none; and which of its choices each is: int64 [T, K] both."""
    kept = _SLOTS_ON_DEVICE.setdefault(placement, {})
    if (rank, ids_TK.device) not in kept:
        kept[rank, ids_TK.device] = _Choice.of(placement, rank, ids_TK.device)
    choice = kept[rank, ids_TK.device]
    if isinstance(choice.slots, Shares):
        choice_TK = ids_TK.masked_fill(ids_TK < 0, placement.num_experts)
        slot_TK = choice.slots.slots_of(choice_TK.reshape(-1)).view(ids_TK.shape)
    else:
        slot_TK = choice.slots[ids_TK].masked_fill(ids_TK < 0, placement.num_slots)
    if choice.fewest_groups is not None:
        source_T = torch.full_like(ids_TK[:, 0], rank)
        slot_TK = choice.fewest_groups.slots_of(
            ids_TK.masked_fill(ids_TK < 0, placement.num_experts), source_T, slot_TK
        )
    return slot_TK.sort(dim=1)


def _local_pairs(
    slot_TK: Tensor, choice_TK: Tensor, weights_TK: Tensor, num_slots: int, num_pairs: int
) -> tuple[_Pairs, Tensor]:
    """This rank's pairs by token and slot, and their flat indices into [T, K]."""
    num_tokens, topk = slot_TK.shape
    place_P = torch.nonzero_static(slot_TK.view(-1) < num_slots, size=num_pairs).view(-1)
    token_P = place_P // topk
    index_P = token_P * topk + choice_TK.reshape(-1)[place_P]
    return _Pairs(token_P, slot_TK.reshape(-1)[place_P], weights_TK.reshape(-1)[index_P], num_tokens), index_P


def _gather_counts(slot_TK: Tensor, num_slots: int, context: DispatchContext) -> RoutingCounts:
    """Every rank's counts, from one all-gather of sum(U) + S + 1 numbers a rank. *Collective.*"""
    hierarchy = context.cluster.hierarchy
    mine = []
    for groups in hierarchy.groups:
        group_TK = slot_TK // (num_slots // groups)  # one more group for the slot of none
        again_TK = torch.zeros_like(group_TK, dtype=torch.bool)
        again_TK[:, 1:] = group_TK[:, 1:] == group_TK[:, :-1]
        mine.append(counted(group_TK.masked_fill(again_TK, groups).view(-1), groups + 1)[:-1])
    mine.append(counted(slot_TK.view(-1), num_slots + 1)[:-1])
    mine.append(torch.full((1,), len(slot_TK), device=slot_TK.device))
    counts = torch.cat(mine).int()
    gathered = counts.new_empty(hierarchy.num_ranks * len(counts))
    with staged("counts"):
        dist.all_gather_into_tensor(gathered, counts, group=context.communicators.ep_group)
    *tokens, pairs_GS, tokens_G1 = (
        gathered.view(hierarchy.num_ranks, -1).cpu().long().split([*hierarchy.groups, num_slots, 1], dim=1)
    )
    return RoutingCounts(tuple(tokens), pairs_GS, tokens_G1[:, 0], slot_TK.shape[1])


def _padded(pairs: _Pairs, index_P: Tensor, num_slots: int, capacity: int, no_pair: int) -> tuple[_Pairs, Tensor]:
    """Exactly C pairs for every slot: places fill choice by choice, then by token; the rest is zero rows.

    A token's choices are ordered by falling routing weight. ``no_pair`` is the index of padding.
    """
    num_tokens = pairs.num_rows
    # Within a token by falling weight; the position there is the choice.
    by_weight = torch.argsort(pairs.weight_P, descending=True, stable=True)
    by_token = by_weight[torch.argsort(pairs.row_P[by_weight], stable=True)]
    pairs_of_token = counted(pairs.row_P, num_tokens)
    first_of_token = (pairs_of_token.cumsum(0) - pairs_of_token)[pairs.row_P[by_token]]
    choice = torch.arange(len(by_token), device=by_token.device) - first_of_token
    # By slot, then choice, then token: the position there is the place.
    by_choice = by_token[torch.argsort(choice, stable=True)]
    by_place = by_choice[torch.argsort(pairs.slot_P[by_choice], stable=True)]
    slot_P = pairs.slot_P[by_place]
    pairs_of_slot = counted(slot_P, num_slots)
    place = torch.arange(len(by_place), device=by_place.device) - (pairs_of_slot.cumsum(0) - pairs_of_slot)[slot_P]
    total = num_slots * capacity
    target = torch.where(place < capacity, slot_P * capacity + place, total)  # one more for what is dropped
    row_P = index_P.new_full((total + 1,), num_tokens).scatter(0, target, pairs.row_P[by_place])[:-1]
    weight_P = pairs.weight_P.new_zeros(total + 1).scatter(0, target, pairs.weight_P[by_place])[:-1]
    index = index_P.new_full((total + 1,), no_pair).scatter(0, target, index_P[by_place])[:-1]
    slot_P = torch.arange(num_slots, device=row_P.device).repeat_interleave(capacity)
    return _Pairs(row_P, slot_P, weight_P, num_tokens), index


def _exchange_pairs(pairs: _Pairs, order_P: Tensor, is_first_P: Tensor, plan: StagePlan) -> _Pairs:
    """Send a stage's metadata: of every pair its slot, marked where a row starts, and its weight. *Collective.*"""
    slot_P = torch.where(is_first_P, pairs.slot_P[order_P] + _FIRST_OF_ROW, pairs.slot_P[order_P]).to(torch.int16)
    weight_P = pairs.weight_P[order_P].contiguous()
    width = weight_P.element_size()
    parts = [slot_P.view(torch.uint8).view(len(slot_P), 2), weight_P.view(torch.uint8).view(len(slot_P), width)]
    sent = torch.cat(parts, dim=1)
    received = exchange(sent, plan.send_pairs, plan.receive_pairs, plan.communicator.group)
    slot_P = received[:, :2].contiguous().view(torch.int16).view(-1).long()
    # A copy even of a single row, which counts as contiguous but does not start where a weight may.
    weight_P = received[:, 2:].clone(memory_format=torch.contiguous_format).view(weight_P.dtype).view(-1)
    is_first_P = slot_P < 0
    slot_P = torch.where(is_first_P, slot_P - _FIRST_OF_ROW, slot_P)
    num_rows = sum(plan.receive_rows)
    row_P = is_first_P.long().cumsum(0) - 1
    # A GPU would have the host wait for this.
    assert row_P.is_cuda or int(is_first_P.sum()) == num_rows, "the metadata names another number of rows than counted"
    return _Pairs(row_P, slot_P, weight_P, num_rows)


def exchange(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Uneven AlltoAll of rows. *Collective: every rank of the group must call it.*

    Args:
        rows: [sum(send), ...], grouped by receiver.
        send: rows to every member of the group.
        receive: rows from every member.
        group: process group.

    Returns:
        [sum(receive), ...], grouped by sender.
    """
    return begin_exchange(rows, send, receive, group, beside_others=False)()


def begin_exchange(
    rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, beside_others: bool
) -> Callable[[], Tensor]:
    """As `exchange`, but what comes back waits for the result; with ``beside_others``, that is not waited for here."""
    if group.size() == 1:
        return lambda: rows
    received, rows = rows.new_empty(sum(receive), *rows.shape[1:]), rows.contiguous()
    work = dist.all_to_all_single(received, rows, receive, send, group=group, async_op=beside_others)

    def arrived() -> Tensor:
        if work is not None:
            work.wait()
        return received

    return arrived
