"""A dispatcher and a placement without a model around them, and questions to them that have a known answer."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hiermoe.dispatch.dispatcher import Dispatched, dispatch_context
from hiermoe.dispatch.plan import DispatchPlan
from hiermoe.measure.copied_layer import CopiedLayer
from hiermoe.measure.replay_job import FACTORS, WEIGHTS, ReplayJob
from hiermoe.megatron.adapter import StagedTokenDispatcher
from hiermoe.megatron.attach import new_dispatcher
from hiermoe.megatron.expert_placement import ExpertPlacement
from hiermoe.megatron.layer_placement import LayerPlacement
from hiermoe.megatron.meter import Meter, MeteredDispatcher
from hiermoe.megatron.standins import cpu
from hiermoe.policies.price_of_moving import STATE_BYTES_PER_PARAMETER
from hiermoe.policies.protocol import Start, StaticPolicy
from hiermoe.policies.system import SystemConfig
from hiermoe.topology.placement import Placement


class BenchDispatcher:
    """Any dispatcher of Megatron's kind, to be called as a `Dispatcher` is.

    All systems, the suite's own too, get the routing map that a router of Megatron's would give them, so what each
    makes of it belongs to its time.
    """

    def __init__(self, inner: Any, num_experts: int, copied: CopiedLayer | None = None) -> None:
        """Wrap ``inner``.

        Args:
            inner: what does the work.
            num_experts: E.
            copied: where experts have copies.
        """
        self._inner, self._num_experts, self.copied = inner, num_experts, copied

    @property
    def local_experts(self) -> Tensor:
        """Logical expert in each slot of this rank: int64 [S / G]."""
        return torch.as_tensor(self._inner.local_expert_indices)

    @property
    def factor_S(self) -> Tensor:
        """What the expert in each slot of this rank multiplies by: float32 [S / G]."""
        return factor_of(self.local_experts) if self.copied is None else self.copied.factor_S

    def dispatch(self, x_TM: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """Make the routing map, then the first three hooks. *Collective.*"""
        probs_TE = weights_TK.new_zeros(len(x_TM), self._num_experts).scatter(1, ids_TK, weights_TK)
        routing_map_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(1, ids_TK, True)
        hidden, probs = self._inner.dispatch_preprocess(x_TM.unsqueeze(1), routing_map_TE, probs_TE)
        hidden, probs = self._inner.token_dispatch(hidden, probs)
        rows_PM, rows_per_slot, weights_P = self._inner.dispatch_postprocess(hidden, probs)
        plan = getattr(self._inner, "plan", None)
        return Dispatched(rows_PM, torch.as_tensor(rows_per_slot).cpu(), weights_P, plan)

    def combine(self, y_PM: Tensor, plan: Any) -> Tensor:
        """The other three hooks. *Collective.*"""
        hidden = self._inner.token_combine(self._inner.combine_preprocess(y_PM))
        return self._inner.combine_postprocess(hidden).squeeze(1)


def bench_layer(
    system: SystemConfig, job: ReplayJob, meter: Meter, start: Start | None = None
) -> tuple[BenchDispatcher, ExpertPlacement]:
    """The metered dispatcher of a system on this rank, and where its experts are.

    *Collective: every rank of the world must call it.* The world is one expert-parallel group. Experts that move are as
    large as their full training state and all zeros; memory is taken only for those that do move. Where experts have
    copies, their weights say which expert they are.

    Args:
        system: what to run.
        job: sizes, cluster and device; on cpu, stand-ins for CUDA are installed in this process.
        meter: times and counts.
        start: experts are where it says, and the policy knows what it did before; None: a first iteration.

    Raises:
        NotApplicable: the system cannot run here.
        ValueError: ranks or experts that do not fit the hierarchy.
    """
    if job.device == "cpu":
        cpu.install()
    sizes, ep_size = job.sizes, job.cluster.hierarchy.num_ranks
    config = TransformerConfig(
        num_layers=1,
        hidden_size=sizes.hidden_size,
        num_attention_heads=1,
        num_moe_experts=sizes.num_experts,
        moe_router_topk=sizes.topk,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=ep_size,
        add_bias_linear=False,
        moe_grouped_gemm=False,
    )
    groups = _groups()
    per_rank = sizes.num_experts // ep_size
    first = groups.ep.rank() * per_rank
    stock = MoEAlltoAllTokenDispatcher(per_rank, list(range(first, first + per_rank)), config, groups)
    context = dispatch_context(system, job.cluster, groups.ep, job.timeout)
    dispatcher = new_dispatcher(system, stock, config, groups, context)
    start = start or Start(0, Placement.identity(sizes.num_experts))
    policy, copied = system.build_policy(), None
    moving: list[LayerPlacement] = []
    if isinstance(dispatcher, StagedTokenDispatcher) and not isinstance(policy, StaticPolicy):
        dispatcher.dispatcher.placement = start.placement
        policy.load_state_dict(start.policy)
        if policy.copies is not None:
            copied = CopiedLayer(job, dispatcher.dispatcher, policy, meter)
            moving = [copied]
        else:
            state_bytes = STATE_BYTES_PER_PARAMETER * sizes.expert_parameters
            states = [torch.zeros(state_bytes, dtype=torch.uint8) for _ in range(per_rank)]
            parameters = [[torch.nn.Parameter(state.to(job.device), requires_grad=False)] for state in states]
            moving = [
                LayerPlacement(job.layer, dispatcher.dispatcher, policy, parameters, sizes.expert_parameters, meter)
            ]
    metered = MeteredDispatcher(dispatcher, job.layer, meter)
    return BenchDispatcher(metered, sizes.num_experts, copied), ExpertPlacement(moving, groups.ep, start.iteration)


@cache
def _groups() -> ProcessGroupCollection:
    """Those that a dispatcher asks for: the world as expert-parallel group, and this rank alone for the others.

    Megatron's own set-up makes two dozen, and a thread of gloo wakes up a hundred times a second for each of them.
    """
    world = dist.group.WORLD
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    assert world is not None and isinstance(alone, dist.ProcessGroup)
    groups = ProcessGroupCollection()
    groups.ep = groups.tp_ep = world
    groups.tp = groups.cp = groups.expt_tp = groups.expt_dp = groups.tp_cp = groups.tp_dp_cp = alone
    return groups


@dataclass(frozen=True)
class Question:
    """One rank's inputs of one iteration, whose answer is known.

    Attributes:
        ids_TK: int64 [T, K], experts of its tokens.
        x_TM: hidden states.
        weight_TK: routing weights, float32.
        gradient_TM: of the output.
    """

    ids_TK: Tensor
    x_TM: Tensor
    weight_TK: Tensor
    gradient_TM: Tensor

    @classmethod
    def draw(cls, ids_TK: Tensor, job: ReplayJob, generator: torch.Generator) -> "Question":
        """Random integers."""

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8).to(job.device)

        shape_TM = len(ids_TK), job.sizes.hidden_size
        return cls(
            ids_TK=ids_TK.to(job.device),
            x_TM=integers(-1, 1, *shape_TM).to(job.dtype),
            weight_TK=integers(1, WEIGHTS, *ids_TK.shape).float(),
            gradient_TM=integers(-1, 1, *shape_TM).to(job.dtype),
        )

    def ask(self, dispatcher: BenchDispatcher, job: ReplayJob) -> int:
        """Dispatch, let experts multiply, combine, and go backward. *Collective.*

        Returns:
            Elements of the output, of the inputs' gradient and of the routing weights' gradient that are wrong; where
            experts have copies, of their weights and summed gradients too.
        """
        copied = dispatcher.copied
        if copied is not None:
            copied.begin(self.ids_TK)
        x_TM, weight_TK = self.x_TM.detach().requires_grad_(), self.weight_TK.detach().requires_grad_()
        arrived = dispatcher.dispatch(x_TM, self.ids_TK, weight_TK)
        factor_S = dispatcher.factor_S.to(job.device)
        rows_per_slot = arrived.rows_per_slot.to(job.device)
        factor_P = factor_S.repeat_interleave(rows_per_slot)
        y_PM = (arrived.rows_PM * (arrived.weights_P * factor_P)[:, None]).to(arrived.rows_PM.dtype)
        if copied is not None:
            y_PM.retain_grad()
        output_TM = dispatcher.combine(y_PM, arrived.plan)
        if copied is not None:
            copied.before_backward()
        output_TM.backward(self.gradient_TM)
        assert x_TM.grad is not None and weight_TK.grad is not None
        factor_TK = factor_of(self.ids_TK)
        if arrived.plan is not None:
            factor_TK *= arrived.plan.kept_TK  # a lossy scheme drops pairs
        scale_T1 = (self.weight_TK * factor_TK).sum(1, keepdim=True)
        alignment_T1 = (self.gradient_TM.float() * self.x_TM.float()).sum(1, keepdim=True)
        wrong = output_TM.detach().float().ne(self.x_TM.float() * scale_T1).sum()
        wrong += x_TM.grad.float().ne(self.gradient_TM.float() * scale_T1).sum()
        wrong += weight_TK.grad.ne(alignment_T1 * factor_TK).sum()
        if copied is not None:
            assert y_PM.grad is not None
            # Of a factor for every column, of which all are equal.
            of_pair_PM = arrived.rows_PM.detach().float() * arrived.weights_P.detach()[:, None] * y_PM.grad.float()
            slot_P = torch.arange(len(factor_S), device=job.device).repeat_interleave(rows_per_slot)
            gradient_SM = of_pair_PM.new_zeros(len(factor_S), of_pair_PM.shape[1]).index_add_(0, slot_P, of_pair_PM)
            wrong += copied.end(gradient_SM, self.gradients_of_experts(job.sizes.num_experts, arrived.plan))
        return int(wrong)

    def gradients_of_experts(self, num_experts: int, plan: DispatchPlan | None) -> Tensor:
        """What this rank's tokens give to the factors of every expert, wherever it is: int64 [E, M], on the CPU."""
        kept_TK = 1 if plan is None else plan.kept_TK
        share_TE = self.weight_TK.new_zeros(len(self.ids_TK), num_experts)
        share_TE.scatter_(1, self.ids_TK, self.weight_TK * kept_TK)
        return (share_TE.T @ (self.x_TM.float() * self.gradient_TM.float())).long().cpu()


def factor_of(expert_ids: Tensor) -> Tensor:
    """What an expert multiplies by: float32 in the shape of the ids."""
    return (1 + expert_ids % FACTORS).float()
