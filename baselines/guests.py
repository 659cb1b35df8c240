"""Experts that are guests on other GPUs for one micro-batch: from how many tokens go where to a placement.

Rivals that know a micro-batch's exact counts end with shares [source GPU, expert, GPU]: of the tokens of a source for
an expert, how many are computed on which GPU. Everything else is the same for all of them, and here.
"""

import torch
from torch import Tensor

from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement


def check_spare(spare: int) -> None:
    """To be called with the slots that a GPU has beyond its own experts.

    Raises:
        ValueError: fewer than one.
    """
    if spare < 1:
        raise ValueError(f"spare={spare} must be at least 1")


def domain_level(hierarchy: Hierarchy) -> int:
    """Level whose groups are NVLink domains: named node, else rack; without these names the outermost of several.

    A hierarchy of one level is a single domain: 0.
    """
    for name in ("node", "rack"):
        if name in hierarchy.names:
            return hierarchy.names.index(name) + 1
    return 1 if hierarchy.depth > 1 else 0


def all_at_home(pairs_GE: Tensor, placement: Placement) -> Tensor:
    """The shares of plain expert parallelism: int64 [G, E, G]."""
    ranks, experts = pairs_GE.shape
    share_GER = pairs_GE.new_zeros(ranks, experts, ranks)
    share_GER[:, torch.arange(experts), placement.rank_of(ranks)] = pairs_GE
    return share_GER


def cut_in_ranges(count_G: Tensor, amount_R: Tensor) -> Tensor:
    """Tokens in the order of their sources, cut into consecutive ranges over GPUs in rank order: int64 [G, R].

    Args:
        count_G: int64 [G], tokens of each source.
        amount_R: int64 [R], tokens for each GPU; as many in all.
    """
    to_G, to_R = count_G.cumsum(0), amount_R.cumsum(0)
    last = torch.minimum(to_G[:, None], to_R)
    first = torch.maximum((to_G - count_G)[:, None], to_R - amount_R)
    return (last - first).clamp(min=0)


def with_guests(share_GER: Tensor, placement: Placement, spare: int | None) -> Placement | None:
    """The placement in which every GPU has its own experts in their order, then its guests by number.

    A slot without a guest has another copy of the GPU's first expert, which nobody uses.

    Args:
        share_GER: int64 [G, E, G].
        placement: where experts are at home, one slot each.
        spare: slots a GPU beyond its own experts; None: as many as the GPU with most guests needs.

    Returns:
        The placement with shares as quotas; None where nobody has a guest and slots are made as needed.

    Raises:
        ValueError: more guests than slots.
    """
    ranks, experts, _ = share_GER.shape
    own = placement.per_rank(ranks)
    home_E = placement.rank_of(ranks)
    used_RE = (share_GER.sum(0) > 0).T.clone()
    used_RE[home_E, torch.arange(experts)] = False
    most = int(used_RE.sum(1).max())
    spare = most if spare is None else spare
    if most > spare:
        raise ValueError(f"a GPU has {most} guests in spare={spare} slots")
    if spare == 0:
        return None
    at_RS = torch.cat(
        [placement.expert_at_S.view(ranks, own)] + [placement.expert_at_S.view(ranks, own)[:, :1]] * spare, 1
    )
    rank, expert = used_RE.nonzero(as_tuple=True)
    slot = own + (used_RE.cumsum(1) - 1)[rank, expert]
    at_RS[rank, slot] = expert
    width = own + spare
    home_slot_E = home_E * width + placement.slot_E % own
    quota_GS = share_GER.new_zeros(ranks, ranks * width)
    quota_GS[:, home_slot_E] = share_GER[:, torch.arange(experts), home_E]
    quota_GS[:, rank * width + slot] = share_GER[:, expert, rank]
    return Placement(at_RS.reshape(-1), home_slot_E.expand(ranks, experts).contiguous(), quota_GS)
