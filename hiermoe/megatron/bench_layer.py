"""A dispatcher and a placement without a model around them, for runs that bring their own routing."""

from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from hiermoe.megatron.adapter import StagedTokenDispatcher
from hiermoe.megatron.attach import dispatch_context, new_dispatcher
from hiermoe.megatron.expert_placement import ExpertPlacement, LayerPlacement
from hiermoe.megatron.meter import Meter, MeteredDispatcher
from hiermoe.megatron.standins import cpu
from hiermoe.policies.price_of_moving import STATE_BYTES_PER_PARAMETER
from hiermoe.policies.protocol import Start, StaticPolicy
from hiermoe.policies.system import SystemConfig
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.placement import Placement


def bench_layer(
    system: SystemConfig,
    cluster: Cluster,
    *,
    num_experts: int,
    topk: int,
    hidden_size: int,
    expert_parameters: int,
    layer: int,
    meter: Meter,
    timeout: timedelta,
    device: str = "cpu",
    start: Start | None = None,
) -> tuple[MoETokenDispatcher, ExpertPlacement]:
    """The metered dispatcher of a system on this rank, and where its experts are.

    *Collective: every rank of the world must call it.* The world is one expert-parallel group.

    Args:
        system: what to run.
        cluster: hierarchy and constants; as many GPUs as the world has ranks.
        num_experts: E.
        topk: K.
        hidden_size: M.
        expert_parameters: of one expert. What moves is as large as its full training state and all zeros; memory is
            taken only for experts that do move.
        layer: what the meter calls the layer.
        meter: times and counts.
        timeout: of a collective.
        device: cpu or cuda; on cpu, stand-ins for CUDA are installed in this process.
        start: experts are where it says, and the policy knows what it did before; None: a first iteration.

    Raises:
        NotApplicable: the system cannot run here.
        ValueError: ranks or experts that do not fit the hierarchy.
    """
    if device == "cpu":
        cpu.install()
    ep_size = cluster.hierarchy.num_ranks
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden_size,
        num_attention_heads=1,
        num_moe_experts=num_experts,
        moe_router_topk=topk,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=ep_size,
        add_bias_linear=False,
        moe_grouped_gemm=False,
    )
    groups = _groups()
    per_rank = num_experts // ep_size
    first = groups.ep.rank() * per_rank
    stock = MoEAlltoAllTokenDispatcher(per_rank, list(range(first, first + per_rank)), config, groups)
    context = dispatch_context(system, cluster, config, groups, timeout)
    dispatcher = new_dispatcher(system, stock, config, groups, context)
    start = start or Start(0, Placement.identity(num_experts))
    policy, moving = system.build_policy(), []
    if isinstance(dispatcher, StagedTokenDispatcher) and not isinstance(policy, StaticPolicy):
        dispatcher.placement = start.placement
        policy.load_state_dict(start.policy)
        states = [
            torch.zeros(STATE_BYTES_PER_PARAMETER * expert_parameters, dtype=torch.uint8) for _ in range(per_rank)
        ]
        parameters = [[torch.nn.Parameter(state.to(device), requires_grad=False)] for state in states]
        moving = [LayerPlacement(layer, dispatcher, policy, parameters, expert_parameters)]
    return MeteredDispatcher(dispatcher, layer, meter), ExpertPlacement(moving, groups.ep, start.iteration)


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
