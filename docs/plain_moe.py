"""A mixture-of-experts layer in plain PyTorch, whose tokens any system of this suite moves."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hiermoe.dispatch.dispatcher import Dispatcher, dispatch_context
from hiermoe.policies.system import SystemConfig
from hiermoe.topology.cluster import Cluster


class PlainMoE(nn.Module):
    """Router, experts and a dispatcher; each rank holds the experts in its own slots."""

    def __init__(self, hidden: int, width: int, num_experts: int, topk: int, dispatcher: Dispatcher) -> None:
        """Make this rank's part of the layer."""
        super().__init__()
        self.topk, self.dispatcher = topk, dispatcher
        self.router = nn.Linear(hidden, num_experts, bias=False)
        self.experts = nn.ModuleDict(
            {str(e): expert(hidden, width) for e in dispatcher.local_experts.tolist()}  # by logical number
        )

    def forward(self, x_TM: Tensor) -> Tensor:
        """[T, M] to [T, M]. *Collective.*"""
        logits_TK, ids_TK = self.router(x_TM).topk(self.topk)
        arrived = self.dispatcher.dispatch(x_TM, ids_TK, logits_TK.softmax(dim=1))
        parts = arrived.rows_PM.split(arrived.rows_per_slot.tolist())
        y_PM = torch.cat([run(rows) for run, rows in zip(self.experts.values(), parts, strict=True)])
        assert arrived.plan is not None
        return self.dispatcher.combine(y_PM * arrived.weights_P[:, None], arrived.plan)

    def sum_router_gradients(self) -> None:
        """Every rank has a copy of the router; experts have seen the tokens of all ranks already. *Collective.*"""
        dist.all_reduce(self.router.weight.grad)


def expert(hidden: int, width: int) -> nn.Sequential:
    """Two layers."""
    return nn.Sequential(nn.Linear(hidden, width), nn.ReLU(), nn.Linear(width, hidden))


def plain_moe(system: str, cluster: Cluster, hidden: int, width: int, num_experts: int, topk: int) -> PlainMoE:
    """The layer of a system in conf/system/, on all ranks of the world. *Collective.*"""
    assert dist.group.WORLD is not None
    context = dispatch_context(SystemConfig.named(system), cluster, dist.group.WORLD)
    return PlainMoE(hidden, width, num_experts, topk, Dispatcher(context, num_experts))
