"""Records what the MoE routers of any Megatron model choose, without touching the model's result."""

from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter


class RouterRecorder:
    """Keeps the best experts of every token, under each router's own rule, from every training forward.

    A forward counts when the router is in training mode and gradients are enabled: the rule by which Megatron itself
    counts tokens for the expert bias. Megatron's activation checkpointing runs a layer first without and then, in
    recomputation, with gradients, so each micro-batch is recorded once; evaluation is not recorded.

    Every recorded forward is checked: the first `topk` recorded experts are the set that the router chose.

    Example:
        >>> recorder = RouterRecorder(model, num_recorded=10)   # any (wrapped) Megatron model
        >>> train_step()
        >>> for layer, forwards in recorder.drain().items():
        ...     ids_SBK = forwards[0]                           # of this rank's first micro-batch
        >>> recorder.detach()

    Attributes:
        layers: Megatron's layer numbers (counted from 1) that are recorded, ascending.
    """

    def __init__(
        self,
        model: torch.nn.Module | list[torch.nn.Module],
        num_recorded: int = 10,
        layers: list[int] | None = None,
        max_forwards: int = 1024,
    ) -> None:
        """Attach to every `TopKRouter` of `model`, those of multi-token prediction apart.

        Args:
            model: A Megatron model, wrapped or not, or the list of its pipeline chunks on this rank.
            num_recorded: Experts to keep per token, at least the router's top-K.
            layers: Layer numbers to record; None for every MoE layer.
            max_forwards: Forwards of one layer that are held until `drain()` is called.

        Raises:
            ValueError: No such router, or a router whose choice is not the best experts under a score.
        """
        routers = find_routers(model)
        missing = sorted(set(layers or []) - routers.keys())
        if missing:
            raise ValueError(f"layers={missing} have no router; MoE layers are {sorted(routers)}")
        self.layers = sorted(routers if layers is None else layers)
        self._routers = {layer: routers[layer] for layer in self.layers}
        for layer, router in self._routers.items():
            _check_router(router, layer, num_recorded)
        self._num_recorded = num_recorded
        self._max_forwards = max_forwards
        self._records: dict[int, list[torch.Tensor]] = {layer: [] for layer in self.layers}
        self._replaced: dict[int, Any] = {}
        for layer, router in self._routers.items():
            self._attach(layer, router)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.detach()

    def drain(self) -> dict[int, list[torch.Tensor]]:
        """Hand over what was recorded since the last call, and forget it.

        Returns:
            For each layer one tensor per forward, in order: expert ids [s, b, num_recorded] of this rank's micro-batch
            of b sequences, by falling score; int32, on the CPU.
        """
        drained = self._records
        self._records = {layer: [] for layer in self.layers}
        return drained

    def detach(self) -> None:
        """Give every router its own `routing` back. Safe to call again; what was recorded can still be drained."""
        for layer, previous in self._replaced.items():
            router = self._routers[layer]
            if previous is None:
                del router.routing  # uncovers the method of the class
            else:
                router.routing = previous
        self._replaced = {}

    def _attach(self, layer: int, router: TopKRouter) -> None:
        routing = router.routing
        self._replaced[layer] = vars(router).get("routing")

        def recorded_routing(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            # The bias and the logits may change after the call, so the scores are taken before it.
            if not (router.training and torch.is_grad_enabled()):
                return routing(logits, *args, **kwargs)
            with torch.no_grad():
                scores_NE = selection_scores(router, logits)
            result = routing(logits, *args, **kwargs)
            with torch.no_grad():
                ids_NK = ranked_experts(scores_NE, result[1], router.topk, self._num_recorded, layer)
            records = self._records[layer]
            if len(records) == self._max_forwards:
                raise RuntimeError(f"layer {layer} holds max_forwards={len(records)} forwards: call drain() every step")
            records.append(ids_NK.view(*logits.shape[:2], -1).to("cpu", torch.int32))
            return result

        router.routing = recorded_routing  # type: ignore[method-assign]


def selection_scores(router: TopKRouter, logits: torch.Tensor) -> torch.Tensor:
    """The scores that `router` takes its best experts from; -inf where the group limit forbids an expert.

    Args:
        router: A stock router.
        logits: [s, b, E] or [N, E].

    Returns:
        [N, E] scores.
    """
    config = router.config
    logits_NE = logits.detach().reshape(-1, logits.shape[-1])
    if router.score_function == "sigmoid":
        scores_NE = torch.sigmoid(logits_NE.float()).type_as(logits_NE)
        if router.expert_bias is not None:
            scores_NE = scores_NE + router.expert_bias
    elif config.moe_router_pre_softmax:
        scores_NE = torch.softmax(logits_NE, dim=-1, dtype=torch.float32).type_as(logits_NE)
    else:
        scores_NE = logits_NE
    num_groups, group_topk = config.moe_router_num_groups, config.moe_router_group_topk
    if not num_groups or not group_topk:
        return scores_NE
    # Megatron scores a group by its best topk // group_topk experts, topk being the router's and not ours.
    groups = scores_NE.view(len(scores_NE), num_groups, -1)
    group_scores = groups.topk(router.topk // group_topk, dim=-1)[0].sum(dim=-1)
    allowed = torch.zeros_like(group_scores, dtype=torch.bool)
    allowed.scatter_(1, group_scores.topk(group_topk, dim=-1, sorted=False)[1], True)
    return groups.masked_fill(~allowed.unsqueeze(-1), float("-inf")).view_as(scores_NE)


def ranked_experts(
    scores_NE: torch.Tensor, routing_map_NE: torch.Tensor, topk: int, num_recorded: int, layer: int
) -> torch.Tensor:
    """The best `num_recorded` experts of each token by falling score, the router's choice first.

    The two are the same order unless scores tie; among equal scores the router's choice decides who comes first.

    Args:
        scores_NE: Selection scores.
        routing_map_NE: The router's choice, True for its `topk` experts.
        topk: Experts that the router chooses.
        num_recorded: Experts to return, at least `topk`.
        layer: For the error message.

    Returns:
        int64 [N, num_recorded].

    Raises:
        RuntimeError: The router did not choose the best `topk` experts under these scores.
    """
    chosen = routing_map_NE.bool()
    lowest = float("-inf")
    wrong = chosen.sum(dim=-1) != topk
    worst_chosen = scores_NE.masked_fill(~chosen, float("inf")).amin(dim=-1)
    best_other = scores_NE.masked_fill(chosen, lowest).amax(dim=-1)
    wrong |= ~(worst_chosen >= best_other) | (worst_chosen == lowest)  # written so that NaN is wrong
    if bool(wrong.any()):
        raise RuntimeError(
            f"layer {layer}: the recorder's best {topk} experts differ from the router's choice for "
            f"{int(wrong.sum())} of {len(wrong)} tokens; this router follows a rule that the recorder does not know"
        )
    first = scores_NE.masked_fill(~chosen, lowest).topk(topk, dim=-1)[1]
    rest = scores_NE.masked_fill(chosen, lowest).topk(num_recorded - topk, dim=-1)[1]
    return torch.cat([first, rest], dim=-1)


def gather_ranks(ids_TK: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor | None:
    """Collect the recorded ids of all ranks on the group's first rank.

    *Collective: every rank of the group must call it*, with equal shapes.

    Args:
        ids_TK: This rank's ids, [T, k] or with further axes in front.
        group: Process group; None for all ranks.

    Returns:
        [rank, *shape] on the first rank, None elsewhere.
    """
    is_first = dist.get_rank(group) == 0
    parts = [torch.empty_like(ids_TK) for _ in range(dist.get_world_size(group))] if is_first else None
    dist.gather(ids_TK.contiguous(), parts, group=group, group_dst=0)
    return torch.stack(parts) if parts is not None else None


def find_routers(model: torch.nn.Module | list[torch.nn.Module], may_lack: bool = False) -> dict[int, TopKRouter]:
    """The routers of a model's decoder, or of the list of its chunks, by Megatron's layer number.

    Args:
        model: A Megatron model, wrapped or not, or the list of its pipeline chunks on this rank.
        may_lack: Whether it may have none, being a part of a model.

    Raises:
        ValueError: There is none, or their layers are not numbered.
    """
    routers: dict[int, TopKRouter] = {}
    for chunk in model if isinstance(model, list) else [model]:
        for name, module in chunk.named_modules():
            # Layers of multi-token prediction are numbered from 1 again and are no part of the decoder.
            if not isinstance(module, TopKRouter) or "mtp" in name.split("."):
                continue
            if module.layer_number is None or module.layer_number in routers:
                raise ValueError(f"router {name} has layer_number={module.layer_number}, which is missing or taken")
            routers[module.layer_number] = module
    if not routers and not may_lack:
        raise ValueError("the model has no TopKRouter to record")
    return routers


def _check_router(router: TopKRouter, layer: int, num_recorded: int) -> None:
    config = router.config
    available = router.weight.shape[0]
    if config.moe_router_num_groups and config.moe_router_group_topk:
        available = available // config.moe_router_num_groups * config.moe_router_group_topk
    if not router.topk <= num_recorded <= available:
        raise ValueError(
            f"num_recorded={num_recorded} is outside {router.topk}..{available}, from the top-K of layer {layer} to "
            "the experts that its router lets a token use"
        )
    if router.routing_type == "sinkhorn":
        raise ValueError(f"layer {layer} routes by sinkhorn, whose choice is no ranking by score")
    if config.moe_expert_capacity_factor is not None:
        raise ValueError(
            f"layer {layer} drops tokens (moe_expert_capacity_factor={config.moe_expert_capacity_factor}): "
            "its routing map is not its choice"
        )
    if router.router_replay is not None:
        raise ValueError(f"layer {layer} replays recorded routing (moe_enable_routing_replay)")
